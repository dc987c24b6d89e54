"""The curves of a training, sent to a tracker as well. results.jsonl and curves/ stay the truth."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import tracking

from mka.limits import InputError
from mka.training import TrainingRun

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


def check_tracker(name: str) -> None:
    """Raises InputError if its package is not installed."""
    if name in PACKAGES and find_spec(PACKAGES[name]) is None:
        raise InputError(f"--track {name} needs the package {PACKAGES[name]}; pip install 'mka[{name}]'")


@contextmanager
def tracked(
    name: str, folder: Path, run_name: str, settings: dict[str, Any]
) -> Iterator[Callable[[TrainingRun], None]]:
    """A function to call after every step of the training `run_name`; on "none" it does nothing."""
    if name == "none":
        yield lambda run: None
        return
    tracker = make_tracker(name, folder, run_name)
    tracker.start()
    tracker.store_init_configuration(settings)

    def on_step(run: TrainingRun) -> None:
        if len(run.losses) == 1:
            tracker.log({"eval/loss": run.curve[0].eval_loss}, step=0)
        values = {"train/loss": run.losses[-1], "train/tokens": run.tokens}
        if run.curve and run.curve[-1].step == len(run.losses) and run.curve[-1].eval_loss is not None:
            values["eval/loss"] = run.curve[-1].eval_loss
        tracker.log(values, step=len(run.losses))

    try:
        yield on_step
    finally:
        tracker.finish()


def make_tracker(name: str, folder: Path, run_name: str) -> Any:
    if name == "tensorboard":
        return tracking.TensorBoardTracker(run_name, logging_dir=folder / "tensorboard")
    if name == "wandb":
        return tracking.WandBTracker("mka", name=run_name, dir=folder)
    return tracking.TrackioTracker("mka", name=run_name)
