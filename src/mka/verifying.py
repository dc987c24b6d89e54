"""What of a run's folder, or of a saved model's, is as it was written: everything is read, a line for each file.

results.jsonl        each line against its own checksum, and all against the names that the manifest has
the folder itself    config.json, curves and the rest, against manifest.json
models, checkpoints  each against a manifest of its own
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

from mka.commands import VerifyConfig
from mka.folders import ALTERED, MISSING, WHOLE, noted_results, states
from mka.limits import InputError
from mka.results import CHECKSUM, is_json, parse_result, raw_lines, results_path
from mka.storage import MANIFEST

AS_IT_IS = f"has no {MANIFEST}, taken as it is"
NO_CHECKSUM = "has no checksum, taken as it is"
CUT = "cut"


def verify(config: VerifyConfig, say: Callable[[str], None]) -> bool:
    """False if something is altered, missing or cut. Raises InputError for a folder that holds nothing to verify."""
    folder = Path(config.folder)
    found = list(all_states(folder))
    if not any(state in (WHOLE, ALTERED, MISSING, CUT, NO_CHECKSUM) for _, state in found):
        raise InputError(
            f"{folder} holds neither results.jsonl nor {MANIFEST}; give the folder of a `mka bench` run or of a saved "
            "model"
        )
    for name, state in found:
        say(f"{name}: {state}")
    bad = sum(state in (ALTERED, MISSING, CUT) for _, state in found)
    say(f"{sum(state == WHOLE for _, state in found):,} whole, {bad:,} not")
    return not bad


def all_states(folder: Path) -> Iterator[tuple[str, str]]:
    """Names and what is to be said of them."""
    yield from lines(folder)
    yield from files(folder, folder, AS_IT_IS)
    for model in folders(folder / "models", "*"):
        yield from files(folder, model, AS_IT_IS)
    for checkpoint in folders(folder / "checkpoints", "*/step-*"):
        yield from files(folder, checkpoint, MISSING)


def folders(place: Path, pattern: str) -> list[Path]:
    """Those that are there under their final names."""
    return sorted(path for path in place.glob(pattern) if path.is_dir() and not path.name.startswith("."))


def lines(folder: Path) -> Iterator[tuple[str, str]]:
    """Those of results.jsonl, and the results that it has lost."""
    there = set()
    for number, line in enumerate(raw_lines(folder) if results_path(folder).is_file() else [], 1):
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
        noted = noted_results(folder)
    except InputError:  # the manifest is altered, which `files` says
        return
    for name in noted:
        if name not in there:
            yield f"results.jsonl, {name}", MISSING


def files(top: Path, folder: Path, without: str) -> Iterator[tuple[str, str]]:
    """Those that a folder's manifest is over; `without`: what is to be said where there is none."""
    place = folder.relative_to(top)
    try:
        found = states(folder)
    except InputError:
        yield (place / MANIFEST).as_posix(), ALTERED
        return
    if not (folder / MANIFEST).is_file():
        yield (place / MANIFEST if without == MISSING else place).as_posix(), without
    for name, state in found.items():
        yield (place / name).as_posix(), state
