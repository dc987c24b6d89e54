"""Files and folders that are either whole or not there: written aside, renamed once, checked at every opening.

write_atomically   one text file
write_folder       several files, with a manifest of their sizes and checksums, written last
check_folder       the details such a folder was written with, or what is wrong with it
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that its name only ever holds the whole text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sweep(folder: Path) -> None:
    """Remove what killed calls of `write_atomically` have left below a folder that only this process writes to."""
    for path in folder.rglob(".*"):
        if path.suffix[1:].isdecimal() and path.is_file():
            path.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(value, indent=2, sort_keys=True) + "\n")


def sync_folder(folder: Path) -> None:
    """Make a rename inside `folder` survive a crash."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_folder(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """The details of a whole folder, or what is wrong with it. Sizes and checksums of all files are read."""
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


def write_folder(folder: Path, fill: Callable[[Path], Mapping[str, Any]]) -> None:
    """Make `folder`: `fill` writes files into the empty folder it is given and returns JSON-able details.

    A damaged folder of that name is replaced, a whole one stays. Of several processes one writes and the others wait
    for it. Whatever goes wrong, nothing is left under the final name nor beside it but an empty lock file.
    Raises OSError if it cannot be written.
    """
    temporary = folder.with_name(f".{folder.name}.building")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock")):
        if check_folder(folder)[0] is not None:
            return
        try:
            build(temporary, fill)
            remove(folder)
            os.replace(temporary, folder)
            sync_folder(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def build(temporary: Path, fill: Callable[[Path], Mapping[str, Any]]) -> None:
    remove(temporary)  # left by a process that was killed: the lock says that nobody is at work on it
    temporary.mkdir()
    details = fill(temporary)
    paths = sorted(temporary.iterdir())
    with ThreadPoolExecutor() as pool:  # the disk and the checksums are at work at the same time
        synced = pool.map(sync_file, paths)
        checksums = list(pool.map(sha256_of, paths))
        list(synced)
    files = {
        path.name: {"size": path.stat().st_size, "sha256": checksum}
        for path, checksum in zip(paths, checksums, strict=True)
    }
    write_atomically(temporary / MANIFEST, manifest_text({"details": dict(details), "files": files}))


def remove(folder: Path) -> None:
    """Take a folder away, its manifest first: what a kill leaves of it is not whole."""
    if folder.exists():
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock, which the system gives back even if this process is killed.

    Without `wait`, raises BlockingIOError while another process holds it.
    """
    with path.open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


def manifest_text(content: Mapping[str, Any]) -> str:
    """The manifest, with its own checksum; one content has exactly one text."""
    canonical = json.dumps(content, sort_keys=True)
    checksum = hashlib.sha256(canonical.encode()).hexdigest()
    return json.dumps({"content": content, "sha256": checksum}, sort_keys=True, indent=1) + "\n"


def sync_file(path: Path) -> None:
    """Make the file's bytes survive a crash."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()
