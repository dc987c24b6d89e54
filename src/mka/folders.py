"""Folders of runs and of saved models: one run at a time writes to one, and what is read from it is what was written.

A saved model is made in one go with its manifest.json, sizes and checksums of all its files (`storage.replace_folder`).
A run's folder changes as the run goes on, and its manifest with it: a file's new checksum is noted beside the old one,
then the file is replaced, then the new checksum stays alone. So the folder is whole at every instant, kills included.
A folder without a manifest.json is taken as it is. No torch here.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mka.limits import InputError
from mka.storage import MANIFEST, damage_of, locked, manifest_text, read_manifest, sha256_of, write_atomically

NOTED = ("config.json", "environment.json", "costs.jsonl", "curves/*.jsonl", "routing/*.json")
"""What the manifest of a run's folder is over. results.jsonl only grows, and its lines carry their own checksums; of
it the manifest has the names of the results."""
LOCK = ".lock"
WHOLE, ALTERED, MISSING = "whole", "altered", "missing"


@contextmanager
def claimed(folder: Path, name: str = "") -> Iterator[None]:
    """Be the only run that writes to the folder, or to what is called `name` in it; the system gives the claim back
    when this process ends. The folder is made if it is not there. Raises InputError if another run has it, or if it
    cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output_dir is {str(folder)!r}, which cannot be made: {error.strerror}") from None
    with ExitStack() as held:
        try:
            held.enter_context(locked(folder / (f".{name}{LOCK}" if name else LOCK), wait=False))
        except BlockingIOError:
            raise InputError(
                f"another run is writing to {folder / name}; wait until it has ended, or choose another --output_dir"
            ) from None
        yield


# The folder of a run.


def write_noted(folder: Path, path: Path, text: str) -> None:
    """Write a file of a run's folder, and note it. Where there is no manifest, none is begun."""
    content = manifest_of(folder)
    if content is None:
        write_atomically(path, text)
        return
    noted = {path.relative_to(folder).as_posix(): entry_of(text.encode())}
    write_manifest(folder, content | {"pending": content.get("pending", {}) | noted})
    write_atomically(path, text)
    write_manifest(folder, content | {"files": content["files"] | noted})


def read_noted(folder: Path, path: Path) -> bytes | None:
    """A file of a run's folder; None where there is none. Raises InputError if it is not what was written."""
    name = path.relative_to(folder).as_posix()
    while True:
        content = manifest_of(folder)
        data = path.read_bytes() if path.is_file() else None
        entries = entries_of(content, name) if content is not None else []
        if data is None or not entries or entry_of(data) in entries:
            return data
        if manifest_of(folder) == content:  # otherwise the run has just replaced the file
            raise InputError(said(folder, name, ALTERED))


def note_everything(folder: Path, results: Iterable[str]) -> None:
    """Begin the manifest of a run's folder, or begin it anew: everything as it is now, and the names of the results."""
    paths = sorted(path for pattern in NOTED for path in folder.glob(pattern))
    files = {
        path.relative_to(folder).as_posix(): {"size": path.stat().st_size, "sha256": sha256_of(path)} for path in paths
    }
    write_manifest(folder, {"details": {"results": sorted(results)}, "files": files, "pending": {}})


def note_result(folder: Path, name: str) -> None:
    """Note that results.jsonl has a result of this name."""
    content = manifest_of(folder)
    if content is not None:
        names = {*content["details"].get("results", ()), name}
        write_manifest(folder, content | {"details": {"results": sorted(names)}})


def noted_results(folder: Path) -> list[str]:
    """The names of the results that results.jsonl has had; none for a folder without a manifest."""
    content = manifest_of(folder)
    return [] if content is None else content["details"].get("results", [])


# Every folder with a manifest.


def states(folder: Path) -> dict[str, str]:
    """For each noted file whether it is whole, altered or missing; empty for a folder without a manifest.

    Raises InputError where the manifest itself is altered.
    """
    while True:
        content = manifest_of(folder)
        if content is None:
            return {}
        names = sorted({*content["files"], *content.get("pending", ())})
        found = {name: state(folder, content, name) for name in names}
        if set(found.values()) <= {WHOLE} or manifest_of(folder) == content:
            return found


def state(folder: Path, content: Mapping[str, Any], name: str) -> str:
    path = folder / name
    if not path.exists():
        return MISSING if name in content["files"] else WHOLE  # a kill came before it was written
    return WHOLE if any(not damage_of(path, entry) for entry in entries_of(content, name)) else ALTERED


def check_saved(folder: Path) -> None:
    """Raises InputError, saying how to go on, for a saved model that is not as it was saved."""
    for name, found in states(folder).items():
        if found != WHOLE:
            raise InputError(said(folder, name, found))


def said(folder: Path, name: str, found: str) -> str:
    return (
        f"{folder / name} is {found}: it is not as it was written; put it back, or delete {folder / MANIFEST} to take "
        "the folder as it is"
    )


def entry_of(data: bytes) -> dict[str, Any]:
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def entries_of(content: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """What a file may be: what it is, and what it is about to become."""
    return [noted[name] for noted in (content["files"], content.get("pending", {})) if name in noted]


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's manifest; None where there is none. Raises InputError for one that is altered."""
    try:
        content = read_manifest(folder)
        if isinstance(content["files"], dict) and isinstance(content["details"], dict):
            return content
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise InputError(said(folder, MANIFEST, ALTERED))


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    write_atomically(folder / MANIFEST, manifest_text({"pending": {}} | dict(content)))
