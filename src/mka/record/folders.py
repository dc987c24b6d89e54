"""Folders of runs and of saved models: only one run writes to a folder, and damage is
noticed.

A saved model is made in one go with its manifest.json, which holds sizes and checksums
of all its files (`storage.replace_folder`). A run's folder changes during the run, and
its manifest with it: a file's new checksum is noted next to the old one, then the file
is replaced, then the old checksum is dropped. So the folder is whole at every instant,
even after a kill. A folder without a manifest.json is accepted as it is. No torch here.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mka.errors import InputError
from mka.storage import (
    MANIFEST,
    damage_of,
    locked,
    manifest_text,
    of_kind,
    read_manifest,
    read_regular,
    sha256_of,
    write_atomically,
)

NOTED = ("config.json", "environment.json", "costs.jsonl", "curves/*.jsonl", "routing/*.json")
"""The files that the manifest of a run's folder covers. results.jsonl only grows and
its lines carry their own checksums, so of it the manifest holds just the names of the
results."""
WRITTEN = (*NOTED, MANIFEST, "table.md", "figures/*.svg")
"""The files in a run's folder that are written under another name first."""
LOCK = ".lock"
WHOLE, ALTERED, MISSING = "whole", "altered", "missing"


@contextmanager
def claimed(folder: Path, name: str = "") -> Iterator[None]:
    """Within the block, be the only run that writes to the folder, or to `name` inside
    it.

    The folder is created if it does not exist. Raises InputError if another run holds
    it, or if it cannot be created. The system releases the claim when this process
    ends.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"output_dir is {str(folder)!r}, which cannot be created: {error.strerror}"
        ) from None
    with ExitStack() as held:
        # Without waiting: a second run is a mistake to report, and a training may take
        # hours.
        try:
            held.enter_context(locked(folder / (f".{name}{LOCK}" if name else LOCK), wait=False))
        except BlockingIOError:
            raise InputError(
                f"another run is writing to {folder / name}; wait until it has ended, or "
                "choose another --output_dir"
            ) from None
        yield


# The folder of a run.


def write_noted(folder: Path, path: Path, text: str) -> None:
    """Write a file in a run's folder, and note its checksum if the folder has a
    manifest."""
    content = manifest_of(folder)
    if content is None:
        write_atomically(path, text)
        return
    # Three whole writes in this order: after a kill between any two of them the file on
    # disk still fits either the old checksum or the pending one.
    noted = {path.relative_to(folder).as_posix(): entry_of(text.encode())}
    write_manifest(folder, content | {"pending": content.get("pending", {}) | noted})
    write_atomically(path, text)
    write_manifest(folder, content | {"files": content["files"] | noted})


def read_noted(folder: Path, path: Path) -> bytes | None:
    """The bytes of a file in a run's folder; None if there is none.

    Raises InputError if they are not what was written.
    """
    name = path.relative_to(folder).as_posix()
    # A report may read while the run writes, so a mismatch counts only if the manifest
    # stays.
    while True:
        content = manifest_of(folder)
        data = read_regular(path) if os.path.lexists(path) else None
        entries = entries_of(content, name) if content is not None else []
        if data is None or not entries or entry_of(data) in entries:
            return data
        if manifest_of(folder) == content:
            raise InputError(damage_line(folder, name, ALTERED))


def note_everything(folder: Path, results: Iterable[str]) -> None:
    """Write a new manifest for a run's folder: its files as they are now, and these
    results."""
    paths = sorted(path for pattern in NOTED for path in folder.glob(pattern))
    files = {
        path.relative_to(folder).as_posix(): {
            "size": path.stat().st_size,
            "sha256": sha256_of(path),
        }
        for path in paths
    }
    write_manifest(folder, {"details": {"results": sorted(results)}, "files": files, "pending": {}})


def note_result(folder: Path, name: str) -> None:
    """Note that results.jsonl has a result of this name, if the folder has a
    manifest."""
    content = manifest_of(folder)
    if content is not None:
        names = {*content["details"].get("results", ()), name}
        write_manifest(folder, content | {"details": {"results": sorted(names)}})


def noted_results(folder: Path) -> list[str]:
    """The names of all results ever noted; empty for a folder without a manifest."""
    content = manifest_of(folder)
    if content is None:
        return []
    try:
        return of_kind(list[str], content["details"].get("results", []))
    except ValueError:
        raise InputError(damage_line(folder, MANIFEST, ALTERED)) from None


# Every folder with a manifest.


def states(folder: Path) -> dict[str, str]:
    """Whether each noted file is whole, altered or missing; empty without a manifest.

    Raises InputError if the manifest itself is altered.
    """
    # As in `read_noted`: a run may be writing, and then everything is read again.
    while True:
        content = manifest_of(folder)
        if content is None:
            return {}
        names = sorted({*content["files"], *content.get("pending", ())})
        found = {name: state(folder, content, name) for name in names}
        if set(found.values()) <= {WHOLE} or manifest_of(folder) == content:
            return found


def state(folder: Path, content: Mapping[str, Any], name: str) -> str:
    """Whether one file is whole, altered or missing, by the manifest's content."""
    path = folder / name
    if not path.exists():
        # A file that is only pending was never written: a kill came first.
        return MISSING if name in content["files"] else WHOLE
    for entry in entries_of(content, name):
        if not damage_of(path, entry):
            return WHOLE
    return ALTERED


def check_saved(folder: Path) -> None:
    """Raise InputError, which says what to do, if a saved model is not as it was
    saved."""
    for name, found in states(folder).items():
        if found != WHOLE:
            raise InputError(damage_line(folder, name, found))


def damage_line(folder: Path, name: str, found: str) -> str:
    """The message for a file that is altered or missing (`found`)."""
    return (
        f"{folder / name} is {found}: it is not as it was written; put it back, or delete "
        f"{folder / MANIFEST} to accept the folder as it is"
    )


def entry_of(data: bytes) -> dict[str, Any]:
    """The manifest's entry for these bytes: their size and sha256."""
    return {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def entries_of(content: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The entries that a file may fit: the noted one, and the one that is pending."""
    return [
        noted[name] for noted in (content["files"], content.get("pending", {})) if name in noted
    ]


def manifest_of(folder: Path) -> dict[str, Any] | None:
    """The content of a folder's manifest; None if there is none.

    Raises InputError if it is altered.
    """
    try:
        return read_manifest(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError:
        raise InputError(damage_line(folder, MANIFEST, ALTERED)) from None


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Replace a folder's manifest; without "pending" in `content`, no file is
    pending."""
    write_atomically(folder / MANIFEST, manifest_text({"pending": {}} | dict(content)))
