"""Checkpoints of one training: whole, checked, and only the newest few kept.

checkpoints/<training>/step-00000100/
    model.safetensors      weights in float32
    optimizer.safetensors  AdamW's moments, by parameter name
    progress.json          losses, curve, counts, loss scaler
    manifest.json          sizes, checksums, which training it belongs to; written last
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

from mka.errors import InputError
from mka.storage import check_folder, remove, sync_file, sync_folder, write_folder, write_json

NAME = "step-{:08d}"
FORMAT = {"format": "pt"}
"""Metadata that transformers requires in a safetensors file."""


@dataclass(frozen=True)
class Checkpoint:
    """What a training needs to resume after `step` optimizer steps."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    progress: dict[str, Any]


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training.

    Attributes:
        folder: where they are; created with the first one.
        identity: JSON-serializable description of model and data.
        keep: how many of the newest ones to keep.
    """

    folder: Path
    identity: Mapping[str, Any]
    keep: int = 2

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, then remove all but the newest `keep`.

        Raises OSError if it cannot be written; older checkpoints then stay.
        """

        def fill(folder: Path) -> dict[str, Any]:
            """Write the three files, and return what the manifest says of them."""
            save_tensors(checkpoint.weights, folder / "model.safetensors")
            save_tensors(checkpoint.optimizer, folder / "optimizer.safetensors")
            write_json(folder / "progress.json", checkpoint.progress)
            return {"step": checkpoint.step, "identity": dict(self.identity)}

        write_folder(self.folder / NAME.format(checkpoint.step), fill)
        # Only after the new one is whole, so that a full disk never costs the last good
        # one.
        for step in self.steps()[self.keep :]:
            remove(self.folder / NAME.format(step))

    def newest(self, say: Callable[[str], None]) -> Checkpoint | None:
        """The newest checkpoint that is whole; None if there is none.

        Damaged ones are skipped and reported with `say`. Raises InputError for a
        checkpoint of another run.
        """
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
        """What is wrong with the checkpoint of a step; "" if it is whole.

        Raises InputError if it belongs to another run.
        """
        folder = self.folder / NAME.format(step)
        details, damage = check_folder(folder)
        if details is None:
            return damage
        # A folder that was renamed by hand is whole, but not this step's.
        if details["step"] != step:
            return f"it is of step {details['step']}"
        # The message names the first difference, with both values.
        different = [
            name for name, value in self.identity.items() if details["identity"].get(name) != value
        ]
        if different:
            held = details["identity"].get(different[0])
            ours = self.identity[different[0]]
            raise InputError(
                f"checkpoint {folder} is of another run: {different[0]} is {held} there, "
                f"{ours} here"
            )
        return ""

    def steps(self) -> list[int]:
        """The steps of all checkpoints in the folder, the newest first."""
        names = [path.name for path in self.folder.glob("step-*") if path.is_dir()]
        return sorted((int(name[5:]) for name in names if name[5:].isdecimal()), reverse=True)

    def export_weights(self, step: int, path: Path) -> None:
        """Put the weights of a checkpoint at `path`, which never holds a part of them.

        Raises InputError if there is no whole checkpoint of that step, or if it belongs
        to another run.
        """
        if damage := self.damage(step):
            folder = self.folder / NAME.format(step)
            raise InputError(
                f"the weights of {folder} cannot be kept: {damage}; run the same command again "
                "to resume"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}")
        temporary.unlink(missing_ok=True)
        weights = self.folder / NAME.format(step) / "model.safetensors"
        # A hard link instead of a copy: the checkpoint is about to be removed anyway.
        # Many network and removable disks have none.
        try:
            os.link(weights, temporary)
        except OSError:
            shutil.copyfile(weights, temporary)
            sync_file(temporary)
        os.replace(temporary, path)
        # The rename does nothing if both names were already the same file.
        temporary.unlink(missing_ok=True)
        sync_folder(path.parent)

    def clear(self) -> None:
        """Remove all of them; their training has its result."""
        for step in self.steps():
            remove(self.folder / NAME.format(step))
        shutil.rmtree(self.folder, ignore_errors=True)
        # The parent folder stays if it holds the checkpoints of another training.
        with suppress(OSError):
            self.folder.parent.rmdir()


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Write a safetensors file. Raises OSError if it cannot be written."""
    try:
        save_file(
            {name: value.detach().contiguous() for name, value in tensors.items()}, path, FORMAT
        )
    except SafetensorError as error:
        # The library's own error names the system's error number only in its text.
        number = re.search(r"os error (\d+)", str(error))
        raise OSError(
            int(number[1]) if number else errno.EIO, f"{path.name} cannot be written: {error}"
        ) from error
