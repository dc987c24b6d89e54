"""The record a run leaves behind, and how it is written and read. No torch here.

One folder:

    config.json       the resolved configuration and the data's fingerprint: what the folder is about
    environment.json  versions, processor, threads, commit
    results.jsonl     one `Result` a line, appended and fsynced as soon as it is known
    curves/           one file a result: a JSON line for each logged step
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from io import FileIO
from pathlib import Path
from typing import Any

from mka.arms import Arm
from mka.config import InputError
from mka.storage import sync_folder, write_atomically

SCHEMA_VERSION = 3
ADDED: dict[int, dict[str, Any]] = {
    1: {"eval_block_losses": [], "flops_per_token": None, "variant": "", "busy_cores": None},
    2: {"variant": "", "busy_cores": None},
}
"""What results of older schema versions lack, and what stands for it."""


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
    line = (json.dumps(asdict(result), sort_keys=True, allow_nan=False) + "\n").encode()
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

    Raises InputError for a folder without results and for a line of another schema.
    """
    path = results_path(folder)
    if not path.is_file():
        raise InputError(f"{folder} holds no results.jsonl; give the folder of a `mka bench` run")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            row = json.loads(line)
        except ValueError:  # not JSON, or not even UTF-8
            continue
        rows.append(parse_result(row, f"{path} line {number}"))
    return rows


def cut_lines(folder: Path) -> list[int]:
    """The lines of results.jsonl that `read_results` passes over: those cut in the middle, counted from 1."""
    lines = results_path(folder).read_bytes().split(b"\n")
    return [number for number, line in enumerate(lines, 1) if line.strip() and not is_json(line)]


def is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def parse_result(row: Any, where: str) -> Result:
    names = {field.name for field in fields(Result)}
    if isinstance(row, dict) and row.get("schema_version") in ADDED:
        row = {**ADDED[row["schema_version"]], **row, "schema_version": SCHEMA_VERSION}
    if not isinstance(row, dict) or row.get("schema_version") != SCHEMA_VERSION or set(row) != names:
        given = row.get("schema_version") if isinstance(row, dict) else None
        raise InputError(f"{where} is not a result of schema version 1 to {SCHEMA_VERSION}; it says {given!r}")
    return Result(**row)


def curve_path(folder: Path, name: str, seed: int) -> Path:
    return folder / "curves" / f"{name}-seed{seed}.jsonl"


def write_curve(folder: Path, name: str, seed: int, points: Iterable[CurvePoint]) -> None:
    lines = "".join(json.dumps(asdict(point)) + "\n" for point in points)
    write_atomically(curve_path(folder, name, seed), lines)


def read_curve(folder: Path, name: str, seed: int) -> list[CurvePoint]:
    """The curve of one result; empty where the file is missing. Raises InputError for a damaged file."""
    path = curve_path(folder, name, seed)
    if not path.is_file():
        return []
    try:
        return [CurvePoint(**json.loads(line)) for line in path.read_bytes().splitlines()]
    except (ValueError, TypeError):
        raise InputError(f"{path} is damaged: not one curve point a line; delete it or run that seed again") from None
