"""Defects of going on, planted in a child process: the comparison of bytes has to notice each of
them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mka.training import checkpoint, loop
from mka.training.checkpoint import Checkpoints
from mka.training.engine import TorchEngine


def forget_moments() -> None:
    """AdamW goes on with empty moments."""
    load = TorchEngine.load

    def load_nothing(
        self: TorchEngine, optimizer: dict[str, torch.Tensor], rest: dict[str, Any]
    ) -> None:
        load(self, {name: torch.zeros_like(values) for name, values in optimizer.items()}, rest)

    TorchEngine.load = load_nothing


def forget_update_counts() -> None:
    """AdamW goes on with its moments but takes the first step for its first."""
    load = TorchEngine.load

    def load_moments(
        self: TorchEngine, optimizer: dict[str, torch.Tensor], rest: dict[str, Any]
    ) -> None:
        zeros = {
            name: torch.zeros_like(values)
            for name, values in optimizer.items()
            if name.endswith(".step")
        }
        load(self, optimizer | zeros, rest)

    TorchEngine.load = load_moments


def one_step_back() -> None:
    """Weights of a step, and progress of the step before it."""
    resume = loop.resume

    def resume_early(*arguments: Any) -> Any:
        engine, run = resume(*arguments)
        return engine, replace(run, losses=run.losses[:-1])

    loop.resume = resume_early


def disturb_weights() -> None:
    """Moments and progress are right, the weights a thousandth off."""
    newest = Checkpoints.newest

    def newest_disturbed(self: Checkpoints, say: Callable[[str], None]) -> Any:
        found = newest(self, say)
        if found is not None:
            found.weights.update({name: values * 1.001 for name, values in found.weights.items()})
        return found

    Checkpoints.newest = newest_disturbed


def forget_curve() -> None:
    """The points of the curve before the interruption are lost."""
    resume = loop.resume

    def resume_bare(*arguments: Any) -> Any:
        engine, run = resume(*arguments)
        return engine, replace(run, curve=run.curve[-1:])

    loop.resume = resume_bare


def believe_every_file() -> None:
    """Checkpoints are opened without a look at their checksums."""

    def check(folder: Path) -> tuple[dict[str, Any], str]:
        content = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["content"]
        return content["details"], ""

    checkpoint.check_folder = check


DEFECTS: dict[str, Callable[[], None]] = {
    function.__name__: function
    for function in (
        forget_moments,
        forget_update_counts,
        one_step_back,
        disturb_weights,
        forget_curve,
        believe_every_file,
    )
}


def plant(name: str) -> None:
    """Make the defect part of this process; "" is none."""
    if name:
        DEFECTS[name]()
