"""Text files: which files in a folder are text, and why a file that was named is
not."""

import os
from collections.abc import Callable
from pathlib import Path

from mka.errors import InputError


def read_named_file(path: Path, option: str = "text_path") -> str:
    """The text of a file that the user named by `option` (default "text_path").

    Raises InputError, naming the option, if it is not a file of UTF-8 text.
    """
    try:
        if not path.exists():
            raise ValueError("does not exist")
        if not path.is_file():
            raise ValueError("is neither a file nor a folder")
        # The mark that some editors put in front is not part of the text.
        return decode_text(path.read_bytes()).removeprefix("\ufeff")
    except OSError as error:
        raise InputError(
            f"{option} {str(path)!r} cannot be read: {error.strerror}; give UTF-8 text"
        ) from error
    except ValueError as error:
        allowed = "files or folders" if option == "text_path" else "a file"
        raise InputError(f"{option} {str(path)!r} {error}; give {allowed} of UTF-8 text") from error


def read_folder(
    folder: Path, pattern: str, wanted: Callable[[Path], bool]
) -> tuple[dict[Path, tuple[str, str]], int]:
    """The texts in a folder and the folders below it.

    Args:
        folder: the folder.
        pattern: which names are considered, as for `Path.rglob`.
        wanted: whether to read a file, given its path relative to the folder.

    Returns (path relative to the folder, text) by resolved path, sorted by the relative
    path; and how many wanted files are not text, or cannot be read.
    """
    documents: dict[Path, tuple[str, str]] = {}
    skipped = 0
    names = {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob(pattern)
        if os.path.isfile(path)
    }
    for name in sorted(names):
        if not wanted(Path(name)):
            continue
        try:
            text = decode_text(names[name].read_bytes())
        except (OSError, ValueError):
            skipped += 1
            continue
        # By resolved path: a file that several links lead to is one document.
        documents.setdefault(names[name].resolve(), (name, text))
    return documents, skipped


def decode_text(raw: bytes) -> str:
    """The UTF-8 text of raw bytes, with its line ends unchanged. Raises ValueError,
    saying why, if it is not text."""
    # NUL is valid UTF-8, but in a file it means that this is a binary format.
    if b"\0" in raw:
        raise ValueError("holds NUL bytes, so it is not text")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"is not UTF-8 (byte {error.start})") from error
    if not text.strip():
        raise ValueError("is blank")
    return text
