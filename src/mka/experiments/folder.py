"""The output folder of a comparison: one configuration, and what is finished of it."""

import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mka.config import PRESETS, ResolvedConfig
from mka.folders import note_everything, read_noted, write_noted
from mka.limits import InputError
from mka.results import flat, read_results, remarks, results_path
from mka.storage import json_text, sweep, write_json

CONFIG = "config.json"
NOT_IDENTITY = (
    *("attention_type", "study", "seeds", "output_dir", "resume", "fp16", "bf16"),
    *("strategy", "deepspeed", "deepspeed_config", "gradient_checkpointing", "ddp_timeout"),
    *("save_steps", "keep_checkpoints", "track"),
)
"""Fields that choose which rows a run adds and how it is carried out, not what a row means."""
PARTS = ("batch_size", "gradient_accumulation_steps")
"""How one rank cuts its rows; what a row means is the product over all ranks, global_batch_size."""


def describe(config: ResolvedConfig, data: dict[str, Any], precision: str, num_ranks: int = 1) -> dict[str, Any]:
    """What every row of one folder has in common, ready for JSON."""
    shared = {name: value for name, value in asdict(config).items() if name not in NOT_IDENTITY}
    shared["global_batch_size"] = config.batch_size * config.gradient_accumulation_steps * num_ranks
    shared |= {"precision": precision, "model": asdict(PRESETS[config.preset]), "data": data}
    return json.loads(json.dumps(shared))


def identity(description: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that two runs must share to be one, under dotted names."""
    return flat({name: value for name, value in description.items() if name not in PARTS})


def choose_folder(config: ResolvedConfig, description: dict[str, Any]) -> Path:
    """The folder that was asked for, or one of the configuration's own under runs/."""
    if config.output_dir is not None:
        return Path(config.output_dir)
    digest = hashlib.sha256(json.dumps(identity(description), sort_keys=True).encode()).hexdigest()[:8]
    return Path("runs") / f"{config.preset}-{config.dataset}-{digest}"


def agree_with_folder(folder: Path, description: dict[str, Any], resume: bool = False) -> dict[str, Any]:
    """The description to go on with; writes nothing. The same command on another number of ranks keeps the global
    batch that the folder was started with.

    Raises InputError if the folder holds another configuration, is not one of ours, or holds an altered file or result;
    with `resume`, if it holds none.
    """
    held = read_description(folder)
    if held is not None:
        remarks(folder)
        if all(held.get(name) == description[name] for name in PARTS) and "global_batch_size" in held:
            description = description | {"global_batch_size": held["global_batch_size"]}
        check_same_run(folder, identity(held), identity(description))
        return held
    if resume:
        raise InputError(f"--resume: {folder} holds no config.json of a run; give its folder by --output_dir")
    if folder.exists() and (not folder.is_dir() or any(not entry.name.startswith(".") for entry in folder.iterdir())):
        raise InputError(f"{folder} is not empty and holds no config.json of a run; choose another --output_dir")
    return description


def open_folder(folder: Path, description: dict[str, Any], environment: dict[str, Any]) -> set[tuple[str, int]]:
    """Begin or reopen a folder that agrees and that only this run writes to; returns the (name, seed) pairs that are
    finished. What is lost or cut in it is said on the standard error.

    config.json comes first: a folder with a manifest and without it, which a kill could leave, would not be ours.
    """
    for remark in remarks(folder):
        print(f"warning: {folder}: {remark}", file=sys.stderr)
    finished = read_results(folder) if results_path(folder).is_file() else []
    folder.mkdir(parents=True, exist_ok=True)
    sweep(folder)
    if not (folder / CONFIG).is_file():
        write_json(folder / CONFIG, description)
    write_noted(folder, folder / "environment.json", json_text(environment))
    note_everything(folder, {result.file_name for result in finished})
    return {result.key for result in finished}


def check_same_run(folder: Path, held: Mapping[str, Any], ours: Mapping[str, Any]) -> None:
    different = [name for name in held.keys() | ours.keys() if held.get(name) != ours.get(name)]
    if different:
        name = min(different, key=lambda name: (name.count("."), name))  # a flag rather than what follows from it
        raise InputError(
            f"{folder} holds a different configuration: {name} is {short(held.get(name))} there and "
            f"{short(ours.get(name))} here; choose another --output_dir"
        )


def read_description(folder: Path) -> dict[str, Any] | None:
    """What the folder's config.json says; None where there is none. Raises InputError for what is no such file."""
    path = folder / CONFIG
    data = read_noted(folder, path)
    if data is None:
        return None
    try:
        held = json.loads(data)
    except ValueError:
        held = None
    if not isinstance(held, dict):
        raise InputError(f"{path} is not the config.json of a run; choose another --output_dir")
    return held


def short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
