"""Files and folders that are either whole or not there.

They are written under a temporary name, renamed once, and checked whenever they are
opened.

write_atomically  write one text file
write_folder      write several files and a manifest of their sizes and checksums; keep
                  a folder that is whole
replace_folder    the same, but replace whatever is there
check_folder      the details such a folder was written with, or what is wrong with it
"""

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
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
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


def check_folder(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """The details of a whole folder and ""; or None and what is wrong with it.

    All files are read, to compare their sizes and checksums.
    """
    try:
        content = read_manifest(folder)
        for name, recorded in content["files"].items():
            if damage := damage_of(folder / name, recorded):
                return None, f"{name} {damage}"
    except OSError:
        return None, f"{MANIFEST} cannot be read"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        # JSON of another shape than a manifest fails in one of these ways.
        return None, f"{MANIFEST} is altered"
    return content["details"], ""


def damage_of(path: Path, recorded: Mapping[str, Any]) -> str:
    """What is wrong with a file, given its recorded size and sha256; "" if nothing
    is."""
    try:
        # The size first: it is known at once, the checksum only after reading the whole
        # file.
        size = path.stat().st_size
        if size != recorded["size"]:
            return f"has {size} bytes instead of {recorded['size']}"
        return "" if sha256_of(path) == recorded["sha256"] else "is altered"
    except OSError:
        return "cannot be read"


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of a folder's manifest.

    Raises OSError if it cannot be read, and ValueError, KeyError or TypeError if it is
    altered.
    """
    raw = (folder / MANIFEST).read_text(encoding="utf-8")
    content = json.loads(raw)["content"]
    # Comparing the text itself also catches changes that JSON would not see, such as a
    # space.
    if raw != manifest_text(content):
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
