"""Files and folders that are either whole or not there: written aside, renamed once, checked at every opening.

write_atomically   one text file
write_folder       several files, with a manifest of their sizes and checksums, written last; a whole one stays
replace_folder     the same, in the place of whatever is there
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


def json_text(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2, sort_keys=True) + "\n"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_atomically(path, json_text(value))


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
        content = read_manifest(folder)
        for name, recorded in content["files"].items():
            if damage := damage_of(folder / name, recorded):
                return None, f"{name} {damage}"
    except OSError:
        return None, f"{MANIFEST} cannot be read"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None, f"{MANIFEST} is altered"
    return content["details"], ""


def damage_of(path: Path, recorded: Mapping[str, Any]) -> str:
    """What is wrong with a file of which size and sha256 were recorded, or ""."""
    try:
        size = path.stat().st_size
        if size != recorded["size"]:
            return f"has {size} bytes instead of {recorded['size']}"
        return "" if sha256_of(path) == recorded["sha256"] else "is altered"
    except OSError:
        return "cannot be read"


def read_manifest(folder: Path) -> dict[str, Any]:
    """Its content. Raises OSError where it cannot be read; ValueError, KeyError or TypeError where it is altered."""
    raw = (folder / MANIFEST).read_text(encoding="utf-8")
    content = json.loads(raw)["content"]
    if raw != manifest_text(content):
        raise ValueError(f"{MANIFEST} is altered")
    return content


def write_folder(folder: Path, fill: Callable[[Path], Mapping[str, Any]]) -> None:
    """Make `folder`: `fill` writes files into the empty folder it is given and returns JSON-able details.

    A damaged folder of that name is replaced, a whole one stays. Of several processes one writes and the others wait
    for it. Whatever goes wrong, nothing is left under the final name nor beside it but an empty lock file.
    Raises OSError if it cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.with_name(f".{folder.name}.lock")):
        if check_folder(folder)[0] is None:
            replace_folder(folder, fill)


def replace_folder(folder: Path, fill: Callable[[Path], Mapping[str, Any]]) -> None:
    """The same for a folder that only this process writes to: what is there gives way, and only to a whole one.

    At any instant the name holds all of the old folder, nothing, or all of the new one.
    """
    temporary, old = (folder.with_name(f".{folder.name}{what}") for what in (".building", ".old.building"))
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        build(temporary, fill)
        remove(old)  # left by a process that was killed
        if folder.is_dir():
            os.replace(folder, old)
        os.replace(temporary, folder)
        sync_folder(folder.parent)
        remove(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def build(temporary: Path, fill: Callable[[Path], Mapping[str, Any]]) -> None:
    remove(temporary)  # left by a process that was killed: the lock says that nobody is at work on it
    temporary.mkdir()
    details = fill(temporary)
    paths = sorted(path for path in temporary.rglob("*") if path.is_file())
    with ThreadPoolExecutor() as pool:  # the disk and the checksums are at work at the same time
        synced = pool.map(sync_file, paths)
        checksums = list(pool.map(sha256_of, paths))
        list(synced)
    files = {
        path.relative_to(temporary).as_posix(): {"size": path.stat().st_size, "sha256": checksum}
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
    return json.dumps({"content": content, "sha256": checksum_of(content)}, sort_keys=True, indent=1) + "\n"


def checksum_of(value: Any) -> str:
    """sha256 (hex) of a JSON value, written with sorted keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


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
