"""The output folder of a comparison: one configuration, and what is finished of it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mka.config import PRESETS, InputError, ResolvedConfig
from mka.results import read_results, results_path, write_json

NOT_IDENTITY = ("attention_type", "seeds", "output_dir", "fp16", "bf16")
"""Fields that choose which rows a run adds, not what a row means."""


def describe(config: ResolvedConfig, data: dict[str, Any], precision: str) -> dict[str, Any]:
    """What every row of one folder has in common, ready for JSON."""
    shared = {name: value for name, value in asdict(config).items() if name not in NOT_IDENTITY}
    shared |= {"precision": precision, "model": asdict(PRESETS[config.preset]), "data": data}
    return json.loads(json.dumps(shared))


def choose_folder(config: ResolvedConfig, description: dict[str, Any]) -> Path:
    """The folder that was asked for, or one of the configuration's own under runs/."""
    if config.output_dir is not None:
        return Path(config.output_dir)
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:8]
    return Path("runs") / f"{config.preset}-{config.dataset}-{digest}"


def open_folder(folder: Path, description: dict[str, Any], environment: dict[str, Any]) -> set[tuple[str, int]]:
    """Make or reopen the folder; returns the (attention_type, seed) pairs that are finished.

    Raises InputError, before anything is written, if the folder holds another configuration or is not one of ours.
    """
    path = folder / "config.json"
    if path.is_file():
        held, ours = flat(read_description(path)), flat(description)
        different = [name for name in held.keys() | ours.keys() if held.get(name) != ours.get(name)]
        if different:
            name = min(different, key=lambda name: (name.count("."), name))  # a flag rather than what follows from it
            raise InputError(
                f"{folder} holds a different configuration: {name} is {short(held.get(name))} there and "
                f"{short(ours.get(name))} here; choose another --output_dir"
            )
    elif folder.exists() and (not folder.is_dir() or any(not entry.name.startswith(".") for entry in folder.iterdir())):
        raise InputError(f"{folder} is not empty and holds no config.json of a run; choose another --output_dir")
    finished = {result.key for result in read_results(folder)} if results_path(folder).is_file() else set()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"output_dir is {str(folder)!r}, which cannot be made: {error.strerror}") from None
    write_json(path, description)
    write_json(folder / "environment.json", environment)
    return finished


def read_description(path: Path) -> dict[str, Any]:
    try:
        held = json.loads(path.read_bytes())
    except ValueError:
        held = None
    if not isinstance(held, dict):
        raise InputError(f"{path} is not the config.json of a run; choose another --output_dir")
    return held


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
