"""The record a run leaves behind, and how it is written and read. No torch here.

One folder:

    config.json       the resolved configuration and the data's fingerprint
    environment.json  versions, processor, threads, commit
    results.jsonl     one `Result` per line with its own checksum, appended and fsynced
                      at once
    curves/           one file per result: one `CurvePoint` per line
    costs.jsonl       one `Cost` per line: what a layer of each mechanism costs at
                      several lengths
    routing/          one `Routing` per trained model: what its router does with
                      held-out text
    models/           the trained models
    checkpoints/      the checkpoints of trainings that have not ended
    manifest.json     checksums of these files and the names of the results
                      (mka.record.folders)
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from io import FileIO
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from mka.errors import InputError
from mka.record.folders import (
    MISSING,
    WHOLE,
    damage_line,
    note_result,
    noted_results,
    read_noted,
    states,
    write_noted,
)
from mka.record.studies import Arm
from mka.storage import Count, checksum_of, of_kind, read_regular, sync_folder

# Raised whenever the lines change, so that readers can complete older ones.
SCHEMA_VERSION = 4
ADDED: dict[int, dict[str, Any]] = {
    1: {"eval_block_losses": [], "flops_per_token": None, "variant": "", "busy_cores": None},
    2: {"variant": "", "busy_cores": None},
    3: {},
}
"""Defaults for fields missing from older schemas, by schema version."""
CHECKSUM = "checksum"
"""The field that holds a line's checksum: that of the object without it
(`storage.checksum_of`)."""


PartOfName = Annotated[str, Meta(pattern=r"^\w[\w.+-]*\Z", max_length=200)]
"""A name that file names begin with; it cannot leave the folder."""
ThreeLevels = Annotated[list[float], Meta(min_length=3, max_length=3)]
"""A number for each of L1, L2 and L3."""


def run_name(name: str, seed: int) -> str:
    """The name that the files of one mechanism (or variant) and seed have."""
    return f"{name}-seed{seed}"


@dataclass(frozen=True)
class RunFolder:
    """The paths of everything in a run's folder."""

    path: Path

    @property
    def config(self) -> Path:
        """The file of the resolved configuration and the data's fingerprint."""
        return self.path / "config.json"

    @property
    def environment(self) -> Path:
        """The file with versions, processor, threads and commit."""
        return self.path / "environment.json"

    @property
    def results(self) -> Path:
        """The file with one `Result` per line."""
        return self.path / "results.jsonl"

    @property
    def costs(self) -> Path:
        """The file with one `Cost` per line."""
        return self.path / "costs.jsonl"

    @property
    def table(self) -> Path:
        """The file of the report's tables."""
        return self.path / "table.md"

    @property
    def figures(self) -> Path:
        """The folder of the report's figures."""
        return self.path / "figures"

    @property
    def models(self) -> Path:
        """The folder of all trained models."""
        return self.path / "models"

    def curve(self, name: str, seed: int) -> Path:
        """The file of a training's curve, one `CurvePoint` per line."""
        return self.path / "curves" / f"{run_name(name, seed)}.jsonl"

    def routing(self, name: str, seed: int) -> Path:
        """The file of a trained model's `Routing`."""
        return self.path / "routing" / f"{run_name(name, seed)}.json"

    def model(self, name: str, seed: int) -> Path:
        """The folder of a trained model."""
        return self.models / run_name(name, seed)

    def weights(self, name: str, seed: int) -> Path:
        """The weights file of a trained model."""
        return self.model(name, seed) / "model.safetensors"

    def checkpoints(self, name: str, seed: int) -> Path:
        """The folder of a training's checkpoints."""
        return self.path / "checkpoints" / run_name(name, seed)


@dataclass(frozen=True, kw_only=True)
class Result:
    """One mechanism, or a variant of it, trained with one seed.

    Attributes:
        variant: names the options that differ from those of the flags; "" if none do.
        train_loss, eval_loss: mean losses, in nats per token.
        perplexity: exp(eval_loss), per token.
        bits_per_byte: the held-out loss in bits per byte of UTF-8, comparable between tokenizers.
        eval_block_losses: the loss of each held-out block, in the order of the split, so that
            mechanisms can be compared on the same text; empty in schema version 1.
        train_seconds, eval_seconds: times; train_seconds never includes evaluation.
        memory_allocated, memory_reserved: peak bytes; None where they could not be measured.
        cache_bytes_per_token: bytes of the whole model's cache in bfloat16, per token of context.
        flops_per_token: FLOPs of matrix products in a forward pass, the mean over the context;
            None in schema version 1.
        skipped_steps: steps that float16 skipped because gradients overflowed.
        busy_cores: how many cores other processes used during the training, the mean; None where
            that is not known.
        config, environment: the settings of this row, and what it was measured on.
    """

    schema_version: int = SCHEMA_VERSION
    attention_type: PartOfName
    variant: Annotated[str, Meta(pattern=r"^[\w.+-]*\Z", max_length=100)] = ""
    seed: Count
    train_loss: float
    eval_loss: float
    perplexity: float
    bits_per_byte: float
    eval_block_losses: list[float]
    train_seconds: float
    eval_seconds: float
    tokens_per_second: float
    memory_allocated: Count | None
    memory_reserved: Count | None
    parameters: Count
    cache_bytes_per_token: Annotated[float, Meta(gt=0)]
    flops_per_token: float | None
    train_tokens: Count
    eval_tokens: Count
    skipped_steps: Count
    busy_cores: float | None = None
    config: dict[str, Any]
    environment: dict[str, Any]

    @property
    def name(self) -> str:
        """The mechanism and its variant, as in file names: mka, mka-w64."""
        return Arm(self.attention_type, self.variant).name

    @property
    def key(self) -> tuple[str, int]:
        """The name and the seed, which no other finished training of the folder has."""
        return self.name, self.seed

    @property
    def file_name(self) -> str:
        """The name of its files and of its trained model."""
        return run_name(self.name, self.seed)


def check_measured(time: float) -> None:
    """Raise ValueError for a time that no clock can have shown."""
    if not 0 <= time < float("inf"):
        raise ValueError(f"a time is {time}")


@dataclass(frozen=True, kw_only=True)
class CurvePoint:
    """One line of a curve, in nats per token; `eval_loss` is None where it was not
    measured."""

    step: Count
    tokens: Count
    seconds: float
    train_loss: float | None
    eval_loss: float | None = None

    def __post_init__(self) -> None:
        check_measured(self.seconds)


COLLAPSED = 0.05
"""Entropy (of at most 1) below which a router has collapsed onto one level."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one layer costs when it reads one row of `tokens` tokens at once.

    Attributes:
        name: the name of the result whose mechanism it is.
        tokens: tokens in the row.
        milliseconds: the median time of a forward pass without gradients.
        state_bytes: bytes of the layer's state afterwards, in bfloat16.
        flops_per_token: FLOPs of the last token.
    """

    name: PartOfName
    tokens: Count
    milliseconds: Annotated[float, Meta(gt=0)]
    state_bytes: Count
    flops_per_token: Count

    def __post_init__(self) -> None:
        check_measured(self.milliseconds)


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What the router of a trained model does; shares are its weights of L1, L2 and L3.

    Attributes:
        name, seed: those of the result.
        edges: boundaries of the pieces of a row; piece i is tokens edges[i] to edges[i
            + 1].
        shares: [layer][piece][level], means over the tokens at which several levels
            exist.
        entropy: [layer], from 0 (one level alone) to 1 (an even mix of the levels that
            exist); None where no token has several levels.
        text: the first held-out row, one string per token.
        served: [token][level] of that row, means over layers.
    """

    name: PartOfName
    seed: Count
    edges: list[Count]
    shares: list[list[ThreeLevels]]
    entropy: list[float | None]
    text: list[str]
    served: list[ThreeLevels]

    def __post_init__(self) -> None:
        pieces = len(self.edges) - 1
        if sorted(set(self.edges)) != list(self.edges) or pieces < 1:
            raise ValueError("edges do not rise")
        if len(self.shares) != len(self.entropy) or any(len(s) != pieces for s in self.shares):
            raise ValueError("shares, entropy and edges do not fit")
        if len(self.text) != len(self.served):
            raise ValueError("text and served do not fit")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as one level, under dotted names that begin with `prefix`."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def append_result(folder: Path, result: Result) -> None:
    """Append one line and fsync it. A last line cut by an earlier crash is ended first.

    Raises OSError if the line cannot be written; the file is then unchanged.
    """
    path = RunFolder(folder).results
    line = line_of(result)
    # Unbuffered: a buffer would write its rest when the file is closed, after the
    # truncation.
    with path.open("a+b", buffering=0) as file:
        start = file.seek(0, os.SEEK_END)
        try:
            write_all(file, b"\n" + line if is_torn(file, start) else line)
            os.fsync(file.fileno())
        except OSError:
            os.truncate(path, start)
            raise
    sync_folder(folder)
    # Noted last: a kill before this leaves a result that is not noted, which does no
    # harm; the other way round a result would be reported as lost.
    note_result(folder, result.file_name)


def line_of(result: Result) -> bytes:
    """A result as a line of JSON with its checksum. Raises ValueError for NaN and
    infinity."""
    # The checksum is over what a reader gets, which JSON may change: tuples become
    # lists.
    row = json.loads(json.dumps(asdict(result), allow_nan=False))
    return (json.dumps(row | {CHECKSUM: checksum_of(row)}, sort_keys=True) + "\n").encode()


def is_torn(file: FileIO, size: int) -> bool:
    """Whether the last line of a file of `size` bytes lacks its line break."""
    if not size:
        return False
    file.seek(size - 1)
    return file.read(1) != b"\n"


def write_all(file: FileIO, data: bytes) -> None:
    """Write all bytes to an unbuffered file. Raises OSError if there is no room."""
    # One write may take only a part of the bytes, as on a disk that fills up.
    while data:
        data = data[file.write(data) :]


def read_results(folder: Path) -> list[Result]:
    """The results in a folder, in the order in which they were written; cut lines are
    skipped.

    Raises InputError for a folder without results, and for a line that is altered or of
    an unknown schema.
    """
    return [result for _, result in read_lines(folder) if result is not None]


def read_lines(folder: Path) -> list[tuple[int, Result | None]]:
    """The number of each line of results.jsonl, from 1, and its result; blank lines are
    left out.

    The result is None for a line that is not JSON, as a crash leaves it. Raises
    InputError as `read_results` does.
    """
    path = RunFolder(folder).results
    found: list[tuple[int, Result | None]] = []
    for number, line in enumerate(raw_lines(folder), 1):
        if not line.strip():
            continue
        # A cut line is a crash, which is no reason to stop; an altered one is refused.
        if is_json(line):
            found.append((number, parse_result(json.loads(line), f"{path} line {number}")))
        else:
            found.append((number, None))
    return found


def raw_lines(folder: Path) -> list[bytes]:
    """The lines of results.jsonl, as bytes. Raises InputError if the file does not
    exist."""
    path = RunFolder(folder).results
    if not os.path.lexists(path):
        what = "holds no results.jsonl" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {what}; give the folder of a `mka bench` run")
    return read_regular(path).split(b"\n")


def is_json(line: bytes) -> bool:
    """Whether a line is JSON."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        # ValueError also covers bytes that are not UTF-8; deep nesting exhausts the
        # stack.
        return False
    return True


def parse_result(row: Any, where: str) -> Result:
    """The result that a line of JSON holds; lines of older schema versions are
    completed.

    where: the file and line, for errors. Raises InputError for a line that is altered
    or of an unknown schema.
    """
    names = {field.name for field in fields(Result)}
    version = row.get("schema_version") if isinstance(row, dict) else None
    if isinstance(row, dict) and CHECKSUM in row:
        row = dict(row)
        if row.pop(CHECKSUM) != checksum_of(row):
            raise InputError(
                f"{where} is altered: its checksum does not fit; take the line out and run its "
                "seed again"
            )
    elif version == SCHEMA_VERSION:
        # Only older versions were written without a checksum.
        raise InputError(
            f"{where} is altered: it has no checksum; take the line out and run its seed again"
        )
    # Older lines are completed rather than refused: results may have taken days.
    if isinstance(row, dict) and isinstance(version, int) and version in ADDED:
        row = {**ADDED[version], **row, "schema_version": SCHEMA_VERSION}
    if (
        not isinstance(row, dict)
        or row.get("schema_version") != SCHEMA_VERSION
        or set(row) != names
    ):
        raise InputError(
            f"{where} is not a result of schema version 1 to {SCHEMA_VERSION}; it says {version!r}"
        )
    try:
        return of_kind(Result, row)
    except ValueError as error:
        raise InputError(f"{where} is not a result: {error}") from None


def no_results(folder: Path) -> InputError:
    """The error for a run in which no training has finished."""
    path = RunFolder(folder).results
    return InputError(f"{path} holds no finished result yet; run `mka bench` on this folder again")


def remarks(folder: Path) -> list[str]:
    """What a reader of a run's folder must know: lines skipped, repeated or lost, files
    missing.

    Raises InputError if a line or file is altered.
    """
    lines = read_lines(folder) if RunFolder(folder).results.is_file() else []
    found: list[str] = []
    numbers: dict[str, list[str]] = {}
    for number, row in lines:
        if row is None:
            found.append(f"results.jsonl is cut in line {number}: that line was skipped")
        else:
            numbers.setdefault(row.file_name, []).append(str(number))
    for name, places in numbers.items():
        if len(places) > 1:
            found.append(
                f"results.jsonl has the result of {name} in lines {' and '.join(places)}: the "
                "last one counts"
            )
    # Deleted lines leave no trace in the file itself, so the manifest's names are
    # asked.
    found += [
        f"results.jsonl has lost the result of {name}"
        for name in noted_results(folder)
        if name not in numbers
    ]
    # A missing file is only reported, because the others can still be used.
    for name, state in states(folder).items():
        if state == MISSING:
            found.append(f"{name} is missing")
        elif state != WHOLE:
            raise InputError(damage_line(folder, name, state))
    return found


def write_curve(folder: Path, name: str, seed: int, points: Iterable[CurvePoint]) -> None:
    """Write the curve of one training, one point per line."""
    lines = "".join(json.dumps(asdict(point)) + "\n" for point in points)
    write_noted(folder, RunFolder(folder).curve(name, seed), lines)


def read_curve(folder: Path, name: str, seed: int) -> list[CurvePoint]:
    """The curve of one training; empty if there is no file. Raises InputError if it is
    damaged."""
    path = RunFolder(folder).curve(name, seed)
    data = read_noted(folder, path)
    if data is None:
        return []
    try:
        return [of_kind(CurvePoint, json.loads(line)) for line in data.splitlines()]
    except (ValueError, RecursionError):
        raise InputError(
            f"{path} is damaged: not one curve point per line; delete it or run that seed again"
        ) from None


def write_costs(folder: Path, costs: Sequence[Cost]) -> None:
    """Write costs.jsonl, one cost per line; it replaces the file that was there."""
    lines = "".join(json.dumps(asdict(cost)) + "\n" for cost in costs)
    write_noted(folder, RunFolder(folder).costs, lines)


def write_routing(folder: Path, routing: Routing) -> None:
    """Write the routing of one trained model, as JSON."""
    write_noted(
        folder,
        RunFolder(folder).routing(routing.name, routing.seed),
        json.dumps(asdict(routing)) + "\n",
    )


def read_costs(folder: Path) -> list[Cost]:
    """The costs in a run's folder; empty if there is no file.

    Raises InputError if the file is damaged.
    """
    path = RunFolder(folder).costs
    data = read_noted(folder, path)
    if data is None:
        return []
    try:
        return [of_kind(Cost, json.loads(line)) for line in data.splitlines()]
    except (ValueError, RecursionError):
        raise InputError(
            f"{path} is damaged: not one cost per line; delete it and run `mka bench` again"
        ) from None


def read_routing(folder: Path, name: str, seed: int) -> Routing | None:
    """The routing of one trained model; None if there is no file.

    Raises InputError if the file is damaged.
    """
    path = RunFolder(folder).routing(name, seed)
    data = read_noted(folder, path)
    if data is None:
        return None
    try:
        return of_kind(Routing, json.loads(data))
    except (ValueError, RecursionError):
        raise InputError(f"{path} is damaged; delete it and run `mka bench` again") from None
