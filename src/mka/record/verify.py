"""Whether the files of a run's folder, or of a saved model, are as they were written.

Everything is read and compared:

results.jsonl        each line with its own checksum, and all of them with the
                     manifest's names
the folder itself    config.json, curves and other files with manifest.json
models, checkpoints  each with a manifest of its own
"""

import json
from collections.abc import Iterator
from pathlib import Path

from mka.errors import InputError
from mka.record.folders import ALTERED, MISSING, WHOLE, manifest_of, noted_results, states
from mka.record.results import CHECKSUM, RunFolder, is_json, parse_result, raw_lines
from mka.storage import MANIFEST

# Folders and results of earlier versions: nothing to compare with, which is not damage.
AS_IT_IS = f"has no {MANIFEST}, accepted as it is"
NO_CHECKSUM = "has no checksum, accepted as it is"
CUT = "cut"
BAD = (ALTERED, MISSING, CUT)


def verify(folder: Path) -> list[tuple[str, str]]:
    """The name and the state of everything in the folder; states in BAD mean damage.

    Raises InputError for a folder that holds nothing to verify.
    """
    found = list(all_states(folder))
    if not any(state in (WHOLE, *BAD, NO_CHECKSUM) for _, state in found):
        what = f"holds neither results.jsonl nor {MANIFEST}"
        what = what if folder.exists() else "does not exist"
        raise InputError(
            f"{folder} {what}; give the folder of a `mka bench` run or of a saved model"
        )
    return found


def all_states(folder: Path) -> Iterator[tuple[str, str]]:
    """The name and the state of each line and file, in the order in which they are
    reported."""
    yield from lines(folder)
    yield from files(folder, folder, AS_IT_IS)
    for model in folders(RunFolder(folder).models, "*"):
        yield from files(folder, model, AS_IT_IS)
    # Unlike a model, a checkpoint was never written without a manifest: without one it
    # is damaged.
    for checkpoint in folders(folder / "checkpoints", "*/step-*"):
        yield from files(folder, checkpoint, MISSING)


def folders(place: Path, pattern: str) -> list[Path]:
    """The folders that a pattern finds in `place`, sorted by path."""
    # Names with a dot are folders that are still being built, or were when a kill came.
    return sorted(
        path for path in place.glob(pattern) if path.is_dir() and not path.name.startswith(".")
    )


def lines(folder: Path) -> Iterator[tuple[str, str]]:
    """The state of each line of results.jsonl, and of the results that it has lost."""
    there = set()
    raw = raw_lines(folder) if RunFolder(folder).results.is_file() else []
    for number, line in enumerate(raw, 1):
        where = f"results.jsonl line {number}"
        if not line.strip():
            continue
        if not is_json(line):
            yield where, CUT
            continue
        row = json.loads(line)
        try:
            result = parse_result(row, where)
        except InputError:
            yield where, ALTERED
            continue
        there.add(result.file_name)
        yield f"{where}, {result.file_name}", WHOLE if CHECKSUM in row else NO_CHECKSUM
    try:
        manifest_of(folder)
    except InputError:
        # The manifest itself is altered, which `files` reports.
        return
    try:
        noted = noted_results(folder)
    except InputError:
        yield MANIFEST, ALTERED
        return
    for name in noted:
        if name not in there:
            yield f"results.jsonl, {name}", MISSING


def files(top: Path, folder: Path, without: str) -> Iterator[tuple[str, str]]:
    """The state of each file that a folder's manifest covers, by its path below `top`.

    without: the state to report if there is no manifest.
    """
    place = folder.relative_to(top)
    try:
        found = states(folder)
    except InputError:
        yield (place / MANIFEST).as_posix(), ALTERED
        return
    if not (folder / MANIFEST).is_file():
        # A missing manifest is named itself; otherwise the line is about the whole
        # folder.
        yield (place / MANIFEST if without == MISSING else place).as_posix(), without
    for name, state in found.items():
        yield (place / name).as_posix(), state
