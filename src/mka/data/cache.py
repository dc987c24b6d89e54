"""Folders that are either whole or not there: written aside, renamed once, checked at every opening."""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mka.config import InputError
from mka.results import sync_folder, write_atomically

MANIFEST = "manifest.json"
ADVICE = "free space there, or set XDG_CACHE_HOME to another folder"


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/mka, or ~/.cache/mka."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mka"


def read_entry(folder: Path) -> dict[str, Any] | None:
    """The details an entry was written with, or None if there is none or it is damaged (said on stderr)."""
    if not folder.is_dir():
        return None
    details, damage = check_entry(folder)
    if damage:
        print(f"token cache {folder}: {damage}; it is built again", file=sys.stderr)
    return details


def check_entry(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """The details of a whole entry, or what is wrong with it. Sizes and checksums of all files are read."""
    try:
        raw = (folder / MANIFEST).read_text(encoding="utf-8")
        content = json.loads(raw)["content"]
        if raw != manifest_text(content):
            return None, f"{MANIFEST} is altered"
        for name, recorded in content["files"].items():
            path = folder / name
            if path.stat().st_size != recorded["size"]:
                return None, f"{name} has {path.stat().st_size} bytes instead of {recorded['size']}"
            if sha256_of(path) != recorded["sha256"]:
                return None, f"{name} is altered"
    except OSError as error:
        return None, f"{Path(error.filename or MANIFEST).name} cannot be read"
    except (ValueError, KeyError, TypeError):
        return None, f"{MANIFEST} is altered"
    return content["details"], ""


def write_entry(folder: Path, fill: Callable[[Path], Mapping[str, Any]]) -> None:
    """Make `folder`: `fill` writes files into the empty folder it is given and returns JSON-able details.

    Of several processes one builds and the others wait for it. Whatever goes wrong, nothing is left under the
    final name nor beside it but an empty lock file. A failed write is an InputError.
    """
    temporary = folder.with_name(f".{folder.name}.building")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_name(f".{folder.name}.lock")):
            if check_entry(folder)[0] is not None:
                return
            try:
                build(temporary, fill)
                remove(folder)
                os.replace(temporary, folder)
                sync_folder(folder.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"the token cache {str(folder.parent)!r} cannot be written: {reason}; {ADVICE}") from error


def build(temporary: Path, fill: Callable[[Path], Mapping[str, Any]]) -> None:
    remove(temporary)  # left by a process that was killed: the lock says that nobody is at work on it
    temporary.mkdir()
    details = fill(temporary)
    files = {path.name: {"size": path.stat().st_size, "sha256": seal(path)} for path in sorted(temporary.iterdir())}
    write_atomically(temporary / MANIFEST, manifest_text({"details": dict(details), "files": files}))


def remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, which the system gives back even if this process is killed."""
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def manifest_text(content: Mapping[str, Any]) -> str:
    """The manifest, with its own checksum; one content has exactly one text."""
    canonical = json.dumps(content, sort_keys=True)
    checksum = hashlib.sha256(canonical.encode()).hexdigest()
    return json.dumps({"content": content, "sha256": checksum}, sort_keys=True, indent=1) + "\n"


def seal(path: Path) -> str:
    """Make the file's bytes survive a crash; returns their sha256."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return sha256_of(path)


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
