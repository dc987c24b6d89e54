"""Checkpoints of one training: whole, checked, the newest few kept.

checkpoints/<training>/step-00000100/model.safetensors       weights in float32
                                     optimizer.safetensors   AdamW's moments, by parameter name
                                     progress.json           losses, curve, counts, the state of the loss scaler
                                     manifest.json           sizes, checksums and whose it is, written last
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mka.limits import InputError
from mka.storage import check_folder, remove, sync_folder, write_folder, write_json

NAME = "step-{:08d}"
FORMAT = {"format": "pt"}
"""What transformers wants to read in a safetensors file."""


@dataclass(frozen=True)
class Checkpoint:
    """What a training needs to go on after `step` optimiser steps."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    progress: dict[str, Any]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training; `identity` says, JSON-able, which model and data they are of."""

    folder: Path
    identity: Mapping[str, Any]
    keep: int = 2

    def save(self, checkpoint: Checkpoint) -> None:
        """Write it, then remove all but the newest `keep`. Raises OSError if there is no room; older ones stay."""

        def fill(folder: Path) -> dict[str, Any]:
            save_tensors(checkpoint.weights, folder / "model.safetensors")
            save_tensors(checkpoint.optimizer, folder / "optimizer.safetensors")
            write_json(folder / "progress.json", checkpoint.progress)
            return {"step": checkpoint.step, "identity": dict(self.identity)}

        write_folder(self.folder / NAME.format(checkpoint.step), fill)
        for step in self.steps()[self.keep :]:
            remove(self.folder / NAME.format(step))

    def newest(self, say: Callable[[str], None]) -> Checkpoint | None:
        """The newest that is whole; says which damaged ones were passed over. Raises InputError for another run's."""
        for step in self.steps():
            folder = self.folder / NAME.format(step)
            damage = self.damage(step)
            if damage:
                say(f"checkpoint {folder} is skipped: {damage}")
                continue
            return Checkpoint(
                step,
                load_file(folder / "model.safetensors"),
                load_file(folder / "optimizer.safetensors"),
                json.loads((folder / "progress.json").read_text(encoding="utf-8")),
            )
        return None

    def damage(self, step: int) -> str:
        """What is wrong with the checkpoint of a step, "" for a whole one. Raises InputError for one of another run."""
        folder = self.folder / NAME.format(step)
        details, damage = check_folder(folder)
        if details is None:
            return damage
        if details["step"] != step:
            return f"it is of step {details['step']}"
        different = [name for name, value in self.identity.items() if details["identity"].get(name) != value]
        if different:
            held = details["identity"].get(different[0])
            ours = self.identity[different[0]]
            raise InputError(f"checkpoint {folder} is of another run: {different[0]} is {held} there, {ours} here")
        return ""

    def steps(self) -> list[int]:
        """Steps of the checkpoints that are there, the newest first."""
        names = [path.name for path in self.folder.glob("step-*") if path.is_dir()]
        return sorted((int(name[5:]) for name in names if name[5:].isdecimal()), reverse=True)

    def export_weights(self, step: int, path: Path) -> None:
        """The weights after `step` under a name of their own, which only ever holds all of them.

        Raises InputError if there is no whole checkpoint of that step, or if it is of another run.
        """
        if damage := self.damage(step):
            folder = self.folder / NAME.format(step)
            raise InputError(f"the weights of {folder} cannot be kept: {damage}; run the same command again to go on")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        temporary.unlink(missing_ok=True)
        os.link(self.folder / NAME.format(step) / "model.safetensors", temporary)
        os.replace(temporary, path)
        temporary.unlink(missing_ok=True)  # it is still there if both names were the same file already
        sync_folder(path.parent)

    def clear(self) -> None:
        """Remove them all, when the training they belong to has its result."""
        for step in self.steps():
            remove(self.folder / NAME.format(step))
        shutil.rmtree(self.folder, ignore_errors=True)
        with suppress(OSError):  # those of another training are in it
            self.folder.parent.rmdir()


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file. Raises OSError if it cannot be written; the library has an error of its own for it."""
    try:
        save_file({name: value.detach().contiguous() for name, value in tensors.items()}, path, FORMAT)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(int(number[1]) if number else errno.EIO, f"{path.name} cannot be written: {error}") from error
