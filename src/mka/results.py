"""The record a run leaves behind, and how it is written and read. No torch here.

One folder:

    config.json       the resolved configuration and the data's fingerprint: what the folder is about
    environment.json  versions, processor, threads, commit
    results.jsonl     one `Result` a line, with a checksum of itself, appended and fsynced as soon as it is known
    curves/           one file a result: a JSON line for each logged step
    manifest.json     checksums of the files above and the names of the results (mka.folders)
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from io import FileIO
from pathlib import Path
from typing import Any

from mka.arms import Arm
from mka.folders import MISSING, WHOLE, note_result, noted_results, read_noted, said, states, write_noted
from mka.limits import InputError
from mka.storage import checksum_of, sync_folder

SCHEMA_VERSION = 4
ADDED: dict[int, dict[str, Any]] = {
    1: {"eval_block_losses": [], "flops_per_token": None, "variant": "", "busy_cores": None},
    2: {"variant": "", "busy_cores": None},
    3: {},
}
"""What results of older schema versions lack, and what stands for it. Their lines have no checksum either."""
CHECKSUM = "checksum"
"""Of a line: that of the object without it (`storage.checksum_of`)."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """One mechanism, or a variant of it, trained with one seed.

    Losses are means in nats per token; `perplexity` is exp(eval_loss), per token; memory in bytes
    (None where it could not be measured); times in seconds, evaluation never part of train_seconds.
    `eval_block_losses` are the losses of the held-out blocks one by one, in the order of the split: what makes
    mechanisms comparable on the same text. `flops_per_token` are those of matrix products, forward, the mean over the
    context. Results of schema version 1 have neither. `variant` names the options in which it differs from the
    mechanism as the flags make it, "" for none; `busy_cores` is how many cores other processes kept busy during the
    training, the mean, where that is known.
    """

    schema_version: int = SCHEMA_VERSION
    attention_type: str
    variant: str = ""
    seed: int
    train_loss: float
    eval_loss: float
    perplexity: float
    bits_per_byte: float
    eval_block_losses: list[float]
    train_seconds: float
    eval_seconds: float
    tokens_per_second: float
    memory_allocated: int | None
    memory_reserved: int | None
    parameters: int
    cache_bytes_per_token: float
    flops_per_token: float | None
    train_tokens: int
    eval_tokens: int
    skipped_steps: int
    busy_cores: float | None = None
    config: dict[str, Any]
    environment: dict[str, Any]

    @property
    def name(self) -> str:
        return Arm(self.attention_type, self.variant).name

    @property
    def key(self) -> tuple[str, int]:
        return self.name, self.seed

    @property
    def file_name(self) -> str:
        """What its files and its trained model are called."""
        return f"{self.name}-seed{self.seed}"


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One line of a curve. `eval_loss` is None except where the held-out split was looked at."""

    step: int
    tokens: int
    seconds: float
    train_loss: float | None
    eval_loss: float | None = None


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def results_path(folder: Path) -> Path:
    return folder / "results.jsonl"


def append_result(folder: Path, result: Result) -> None:
    """Append one line and fsync it. A torn last line of an earlier crash is closed off first.

    Raises OSError where it cannot be written; the file is then as it was.
    """
    path = results_path(folder)
    line = line_of(result)
    # Unbuffered: a buffer would write its rest when the file is closed, after the truncation.
    with path.open("a+b", buffering=0) as file:
        start = file.seek(0, os.SEEK_END)
        try:
            write_all(file, b"\n" + line if is_torn(file, start) else line)
            os.fsync(file.fileno())
        except OSError:
            os.truncate(path, start)
            raise
    sync_folder(folder)
    note_result(folder, result.file_name)


def line_of(result: Result) -> bytes:
    row = json.loads(json.dumps(asdict(result), allow_nan=False))  # as whoever reads the line will find it
    return (json.dumps(row | {CHECKSUM: checksum_of(row)}, sort_keys=True) + "\n").encode()


def is_torn(file: FileIO, size: int) -> bool:
    """Whether the last line of a file of `size` bytes has no end."""
    if not size:
        return False
    file.seek(size - 1)
    return file.read(1) != b"\n"


def write_all(file: FileIO, data: bytes) -> None:
    """One write may take only a part, as on a disk that fills up."""
    while data:
        data = data[file.write(data) :]


def read_results(folder: Path) -> list[Result]:
    """Results of a folder, in the order they were written; a torn line is passed over.

    Raises InputError for a folder without results, for a line of another schema and for one that is altered.
    """
    return [result for _, result in read_lines(folder) if result is not None]


def read_lines(folder: Path) -> list[tuple[int, Result | None]]:
    """The lines of results.jsonl, counted from 1, without blank ones; None for one that is cut or no JSON at all."""
    path = results_path(folder)
    lines = [(n, line) for n, line in enumerate(raw_lines(folder), 1) if line.strip()]
    return [(n, parse_result(json.loads(line), f"{path} line {n}") if is_json(line) else None) for n, line in lines]


def raw_lines(folder: Path) -> list[bytes]:
    """Raises InputError for a folder without results."""
    path = results_path(folder)
    if not path.is_file():
        raise InputError(f"{folder} holds no results.jsonl; give the folder of a `mka bench` run")
    return path.read_bytes().split(b"\n")


def is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):  # not JSON, or not even UTF-8
        return False
    return True


def parse_result(row: Any, where: str) -> Result:
    names = {field.name for field in fields(Result)}
    version = row.get("schema_version") if isinstance(row, dict) else None
    if isinstance(row, dict) and CHECKSUM in row:
        row = dict(row)
        if row.pop(CHECKSUM) != checksum_of(row):
            raise InputError(f"{where} is altered: its checksum does not fit; take the line out and run its seed again")
    elif version == SCHEMA_VERSION:
        raise InputError(f"{where} is altered: it has no checksum; take the line out and run its seed again")
    if isinstance(row, dict) and isinstance(version, int) and version in ADDED:
        row = {**ADDED[version], **row, "schema_version": SCHEMA_VERSION}
    if not isinstance(row, dict) or row.get("schema_version") != SCHEMA_VERSION or set(row) != names:
        raise InputError(f"{where} is not a result of schema version 1 to {SCHEMA_VERSION}; it says {version!r}")
    return Result(**row)


def remarks(folder: Path) -> list[str]:
    """What a reader of a run's folder must know: lines that were passed over, that are there twice or gone, and files
    that are gone.

    Raises InputError where one is altered.
    """
    lines = read_lines(folder) if results_path(folder).is_file() else []
    found = [f"results.jsonl is cut in line {n}: that line was passed over" for n, row in lines if row is None]
    numbers: dict[str, list[str]] = {}
    for n, row in lines:
        if row is not None:
            numbers.setdefault(row.file_name, []).append(str(n))
    for name, places in numbers.items():
        if len(places) > 1:
            found.append(f"results.jsonl has the result of {name} in lines {' and '.join(places)}: the last one counts")
    found += [f"results.jsonl has lost the result of {name}" for name in noted_results(folder) if name not in numbers]
    for name, state in states(folder).items():
        if state == MISSING:
            found.append(f"{name} is missing")
        elif state != WHOLE:
            raise InputError(said(folder, name, state))
    return found


def curve_path(folder: Path, name: str, seed: int) -> Path:
    return folder / "curves" / f"{name}-seed{seed}.jsonl"


def write_curve(folder: Path, name: str, seed: int, points: Iterable[CurvePoint]) -> None:
    lines = "".join(json.dumps(asdict(point)) + "\n" for point in points)
    write_noted(folder, curve_path(folder, name, seed), lines)


def read_curve(folder: Path, name: str, seed: int) -> list[CurvePoint]:
    """The curve of one result; empty where the file is missing. Raises InputError for a damaged file."""
    path = curve_path(folder, name, seed)
    data = read_noted(folder, path)
    if data is None:
        return []
    try:
        return [CurvePoint(**json.loads(line)) for line in data.splitlines()]
    except (ValueError, TypeError):
        raise InputError(f"{path} is damaged: not one curve point a line; delete it or run that seed again") from None
