"""Files and folders that are either whole or not there.

They are written under a temporary name, renamed once, and checked whenever they are
opened.

write_atomically  write one text file
write_folder      write several files and a manifest of their sizes and checksums; keep
                  a folder that is whole
replace_folder    the same, but replace whatever is there
check_folder      the details such a folder was written with, or what is wrong with it
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, TypeVar

import msgspec

MANIFEST = "manifest.json"
LARGEST_MANIFEST = 2**26
"""Bytes; a manifest has some hundred per file."""
T = TypeVar("T")
Count = Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)]
"""A whole number of something."""


@dataclass(frozen=True)
class Noted:
    """What a manifest says of a file."""

    size: Count
    sha256: Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]


@dataclass(frozen=True)
class Manifest:
    """The content of a manifest.

    Raises ValueError for a file outside the folder.
    """

    details: dict[str, Any]
    files: dict[str, Noted]
    pending: dict[str, Noted] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in (*self.files, *self.pending):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
                raise ValueError(f"{name!r} is not a name of a file in the folder")


TEMPORARY = re.compile(r"\.(.+)\.mka-\d+")
"""Names under which `write_atomically` writes: of the file, then of the process."""


def write_atomically(path: Path, text: str) -> None:
    """Write a UTF-8 file so that its name only ever holds the whole text.

    What is there stays what it is: a link is followed, a file keeps its permissions, a
    device or pipe gets the text. Raises OSError if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not `exists`: an error such as a loop of links is reported here.
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        mode = None
    if mode is not None and not stat.S_ISREG(mode):
        write_into(path, text)
        return
    path = Path(os.path.realpath(path))
    # The process's id keeps two writers apart, and lets `sweep` recognize what a kill
    # has left.
    temporary = path.with_name(f".{path.name}.mka-{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            if mode is not None:
                os.fchmod(file.fileno(), stat.S_IMODE(mode))
            file.write(text)
            file.flush()
            # On disk before the rename is, or a crash could leave the name with an
            # empty file.
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def write_into(path: Path, text: str) -> None:
    """Write a text into a device or pipe. Raises OSError if that is not possible, and
    for a pipe that nobody reads."""
    # Without O_NONBLOCK, opening a pipe waits until somebody reads it.
    handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
    os.set_blocking(handle, True)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)


def sweep(folder: Path, patterns: Iterable[str]) -> None:
    """Remove what killed calls of `write_atomically` have left of files in a folder
    whose relative names match these patterns; everything else stays.

    No other process may be writing to these files.
    """
    for pattern in patterns:
        place = (folder / pattern).parent
        for path in place.glob(".*"):
            written = TEMPORARY.fullmatch(path.name)
            ours = written and fnmatchcase(written[1], Path(pattern).name)
            if ours and path.is_file() and not path.is_symlink():
                path.unlink(missing_ok=True)


def json_text(value: Mapping[str, Any]) -> str:
    """A JSON object as a readable file holds it: indented, with sorted keys."""
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object to a file, as `write_atomically` does."""
    write_atomically(path, json_text(value))


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a crash of the machine."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_regular(path: Path, most: int | None = None) -> bytes:
    """The bytes of a file. Raises OSError for what is not a regular file, such as a
    pipe, which may never end, and for one of more than `most` bytes (None: no limit)."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    if most is not None and found.st_size > most:
        raise OSError(errno.EFBIG, f"it has more than {most:,} bytes", str(path))
    return path.read_bytes()


def of_kind(kind: type[T], value: Any) -> T:
    """A value that JSON held, as a dataclass or another type. Raises ValueError, which
    says where they differ, if it does not fit."""
    try:
        return msgspec.convert(value, kind)
    except (msgspec.ValidationError, OverflowError, RecursionError) as error:
        raise ValueError(str(error)) from None


def check_folder(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """The details of a whole folder and ""; or None and what is wrong with it.

    All files are read, to compare their sizes and checksums.
    """
    try:
        content = read_manifest(folder)
    except OSError:
        return None, f"{MANIFEST} cannot be read"
    except ValueError:
        return None, f"{MANIFEST} is altered"
    for name, recorded in content["files"].items():
        if damage := damage_of(folder / name, recorded):
            return None, f"{name} {damage}"
    return content["details"], ""


def damage_of(path: Path, recorded: Mapping[str, Any]) -> str:
    """What is wrong with a file, given its recorded size and sha256; "" if nothing
    is."""
    try:
        # The size first: it is known at once, the checksum only after reading the whole
        # file.
        found = path.stat()
        size = found.st_size
        if not stat.S_ISREG(found.st_mode):
            return "is not a regular file"
        if size != recorded["size"]:
            return f"has {size} bytes instead of {recorded['size']}"
        return "" if sha256_of(path) == recorded["sha256"] else "is altered"
    except OSError:
        return "cannot be read"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of a folder's manifest.

    Raises OSError if it cannot be read, and ValueError if it is altered, or its content
    is not a manifest's.
    """
    raw = read_regular(folder / MANIFEST, LARGEST_MANIFEST)
    try:
        held = json.loads(raw)
    except RecursionError:
        raise ValueError(f"{MANIFEST} is nested too deeply") from None
    content: dict[str, Any] = held.get("content", {}) if isinstance(held, dict) else {}
    of_kind(Manifest, content)
    # Comparing the text itself also catches changes that JSON would not see, such as a
    # space.
    if raw != manifest_text(content).encode():
        raise ValueError(f"{MANIFEST} is altered")
    return content


def write_folder(folder: Path, fill: Callable[[Path], Mapping[str, Any]]) -> None:
    """Write a folder: `fill` writes files into an empty folder and returns JSON-able
    details.

    A whole folder of that name is kept, a damaged one is replaced. If several processes
    call this, one writes and the others wait for it. After an error nothing is left
    except an empty lock file. Raises OSError if the folder cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    # The check is inside the lock, so that a process that waited finds the folder
    # whole.
    with locked(folder.with_name(f".{folder.name}.lock")):
        if check_folder(folder)[0] is None:
            replace_folder(folder, fill)


def replace_folder(folder: Path, fill: Callable[[Path], Mapping[str, Any]]) -> None:
    """Write a folder as `write_folder` does, replacing whatever has that name.

    No other process may write to it. At any instant the name holds all of the old
    folder, nothing, or all of the new one. Raises OSError if the folder cannot be
    written.
    """
    temporary = folder.with_name(f".{folder.name}.building")
    old = folder.with_name(f".{folder.name}.old.building")
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        build(temporary, fill)
        # Left by a process that was killed between the two renames below.
        remove(old)
        # A folder that is not empty cannot be renamed over, so the old one is moved
        # away first.
        if folder.is_dir():
            os.replace(folder, old)
        os.replace(temporary, folder)
        sync_folder(folder.parent)
        remove(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def build(temporary: Path, fill: Callable[[Path], Mapping[str, Any]]) -> None:
    """Fill a new folder, make its files survive a crash, and write its manifest
    last."""
    # Left by a process that was killed: no other one is at work on it now.
    remove(temporary)
    temporary.mkdir()
    details = fill(temporary)
    paths = sorted(path for path in temporary.rglob("*") if path.is_file())
    # Libraries that write weights make them readable for the owner alone.
    mode = usual_mode(temporary)
    for path in paths:
        path.chmod(mode)
    # In threads, because the disk and the checksums can work at the same time.
    with ThreadPoolExecutor() as pool:
        synced = pool.map(sync_file, paths)
        checksums = list(pool.map(sha256_of, paths))
        # Errors in a thread are only raised when its result is taken.
        list(synced)
    files = {
        path.relative_to(temporary).as_posix(): {"size": path.stat().st_size, "sha256": checksum}
        for path, checksum in zip(paths, checksums, strict=True)
    }
    write_atomically(
        temporary / MANIFEST, manifest_text({"details": dict(details), "files": files})
    )


def usual_mode(folder: Path) -> int:
    """The permissions that a new file in a folder gets."""
    # Created for this alone: the umask could only be read by changing it.
    probe = folder / f".mode.mka-{os.getpid()}"
    try:
        probe.touch(exist_ok=False)
        return stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)


def remove(folder: Path) -> None:
    """Delete a folder, if it exists."""
    if folder.exists():
        # The manifest goes first, so that what a kill leaves never counts as whole.
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock on a file within the block.

    The system releases it even if this process is killed. Without `wait`, raises
    BlockingIOError while another process holds it.
    """
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def manifest_text(content: Mapping[str, Any]) -> str:
    """The text of a manifest, with its own checksum; equal contents have equal
    texts."""
    manifest = {"content": content, "sha256": checksum_of(content)}
    return json.dumps(manifest, sort_keys=True, indent=1) + "\n"


def checksum_of(value: Any) -> str:
    """sha256 (hex) of a JSON value, written with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def sync_file(path: Path) -> None:
    """Make the file's bytes survive a crash."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    # In pieces of 1 MiB: weights may be larger than memory.
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
