"""The output folder of a comparison: one configuration, and the results that are
finished."""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from mka.errors import InputError, check_utf8, printable
from mka.record.config import PRESETS, ResolvedConfig
from mka.record.folders import WRITTEN, note_everything, read_noted, write_noted
from mka.record.results import RunFolder, flat, read_results, remarks
from mka.storage import json_text, of_kind, sweep, write_json

NOT_IDENTITY = (
    *("attention_type", "study", "seeds", "output_dir", "resume", "fp16", "bf16"),
    *("strategy", "deepspeed", "deepspeed_config", "gradient_checkpointing", "ddp_timeout"),
    *("save_steps", "keep_checkpoints", "track"),
)
"""Fields that choose which results a run adds and how it runs, not what a result
means."""


@dataclass(frozen=True)
class GlobalBatch:
    """What a folder's config.json says that a run computes with, and does not only
    compare."""

    global_batch_size: Annotated[int, Meta(ge=1, le=2**31)] = 1


PARTS = ("batch_size", "gradient_accumulation_steps")
"""Fields that divide a step on one rank; for a result only global_batch_size matters,
their product times the number of ranks."""


def describe(
    config: ResolvedConfig, data: dict[str, Any], precision: str, num_ranks: int = 1
) -> dict[str, Any]:
    """What every result in one folder has in common, ready for JSON.

    data: the summary of the corpus. precision: the name of the one that was chosen.
    """
    shared = {name: value for name, value in asdict(config).items() if name not in NOT_IDENTITY}
    shared["global_batch_size"] = config.batch_size * config.gradient_accumulation_steps * num_ranks
    shared |= {"precision": precision, "model": asdict(PRESETS[config.preset]), "data": data}
    # Through JSON, so that it equals what config.json holds: tuples become lists.
    return json.loads(json.dumps(shared))


def identity(description: Mapping[str, Any]) -> dict[str, Any]:
    """The settings in which two runs must agree to share a folder, under dotted
    names."""
    return flat({name: value for name, value in description.items() if name not in PARTS})


def choose_folder(config: ResolvedConfig, description: dict[str, Any]) -> Path:
    """The folder that was asked for, or one in runs/ named after the configuration.

    Raises InputError for one whose path is not UTF-8.
    """
    # The libraries that write weights take no names but UTF-8.
    check_utf8("output_dir", str(Path(config.output_dir or "runs").resolve()))
    if config.output_dir is not None:
        return Path(config.output_dir)
    # A digest of the settings, so that the same command finds the same folder again.
    settings = json.dumps(identity(description), sort_keys=True)
    digest = hashlib.sha256(settings.encode()).hexdigest()
    return Path("runs") / f"{config.preset}-{config.dataset}-{digest[:8]}"


def agree_with_folder(
    folder: Path, description: dict[str, Any], resume: bool = False
) -> dict[str, Any]:
    """The description to use: the folder's own, or if it is new, the given one. Writes
    nothing.

    Raises InputError if the folder holds another configuration, is not the folder of a
    run, or holds an altered file or result; with `resume` also if it holds no run.
    """
    held = read_description(folder)
    if held is not None:
        # For its errors only; `open_folder` prints the remarks.
        remarks(folder)
        # The same command on another number of ranks keeps the global batch of the
        # folder.
        if (
            all(held.get(name) == description[name] for name in PARTS)
            and "global_batch_size" in held
        ):
            description = description | {"global_batch_size": held["global_batch_size"]}
        check_same_run(folder, identity(held), identity(description))
        return held
    if resume:
        raise InputError(
            f"--resume: {folder} holds no config.json of a run; give its folder by --output_dir"
        )
    # Hidden files are allowed: the lock of a run that failed before it wrote anything.
    if folder.exists() and (
        not folder.is_dir() or any(not entry.name.startswith(".") for entry in folder.iterdir())
    ):
        raise InputError(
            f"{folder} is not empty and holds no config.json of a run; choose another --output_dir"
        )
    return description


def open_folder(
    folder: Path, description: dict[str, Any], environment: dict[str, Any]
) -> set[tuple[str, int]]:
    """Begin or reopen a folder that agrees and that only this run writes to.

    Returns the (name, seed) pairs that are finished. Prints a warning on stderr for
    each line or file that is lost or cut. Raises InputError if a file or a line is
    altered.
    """
    for remark in remarks(folder):
        print(printable(f"warning: {folder}: {remark}"), file=sys.stderr)
    finished = read_results(folder) if RunFolder(folder).results.is_file() else []
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder, WRITTEN)
    # config.json comes first: without it, a folder in which a kill left only a manifest
    # would not be recognized as a run's.
    if not (RunFolder(folder).config).is_file():
        write_json(RunFolder(folder).config, description)
    write_noted(folder, RunFolder(folder).environment, json_text(environment))
    note_everything(folder, {result.file_name for result in finished})
    return {result.key for result in finished}


def check_same_run(folder: Path, held: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    """Raise InputError, naming one setting, if the folder's settings differ from
    ours."""
    different = [name for name in held.keys() | ours.keys() if held.get(name) != ours.get(name)]
    if different:
        # The name with the fewest dots is a flag, rather than something that follows
        # from it.
        name = min(different, key=lambda name: (name.count("."), name))
        raise InputError(
            f"{folder} holds a different configuration: {name} is {short(held.get(name))} there "
            f"and {short(ours.get(name))} here; choose another --output_dir"
        )


def read_description(folder: Path) -> dict[str, Any] | None:
    """The content of the folder's config.json; None if there is none.

    Raises InputError if the file is not that of a run.
    """
    path = RunFolder(folder).config
    data = read_noted(folder, path)
    if data is None:
        return None
    try:
        held = of_kind(dict[str, Any], json.loads(data))
        of_kind(GlobalBatch, held)
        return held
    except (ValueError, RecursionError):
        raise InputError(
            f"{path} is not the config.json of a run; choose another --output_dir"
        ) from None


def short(value: Any) -> str:
    """A value as JSON, cut to 60 characters."""
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
