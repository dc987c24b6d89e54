"""Send the curves of a training to a tracker; results.jsonl and curves/ remain the
reference."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import tracking

from mka.errors import InputError
from mka.training import TrainingRun

PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb", "trackio": "trackio"}


def check_tracker(name: str) -> None:
    """Raise InputError if the tracker's package is not installed."""
    if name in PACKAGES and find_spec(PACKAGES[name]) is None:
        raise InputError(
            f"--track {name} needs the package {PACKAGES[name]}; pip install 'mka[{name}]'"
        )


@contextmanager
def tracked(
    name: str, folder: Path, run_name: str, settings: dict[str, Any]
) -> Iterator[Callable[[TrainingRun], None]]:
    """Within the block, a function to call after every step of the training `run_name`.

    With the tracker "none" it does nothing.
    """
    if name == "none":
        yield lambda run: None
        return
    tracker = make_tracker(name, folder, run_name)
    tracker.start()
    tracker.store_init_configuration(settings)

    def on_step(run: TrainingRun) -> None:
        """Send the losses of the last step."""
        # The loss before training is in the curve before there is any step to call this
        # after.
        if len(run.losses) == 1:
            tracker.log({"eval/loss": run.curve[0].eval_loss}, step=0)
        # The curve gets its point before this is called, so its last point may be this
        # step's.
        values = {"train/loss": run.losses[-1], "train/tokens": run.tokens}
        if (
            run.curve
            and run.curve[-1].step == len(run.losses)
            and run.curve[-1].eval_loss is not None
        ):
            values["eval/loss"] = run.curve[-1].eval_loss
        tracker.log(values, step=len(run.losses))

    # Finished after errors too, so that what was sent is kept.
    try:
        yield on_step
    finally:
        tracker.finish()


def make_tracker(name: str, folder: Path, run_name: str) -> Any:
    """accelerate's tracker of this name; its files, if any, are in the run's folder."""
    if name == "tensorboard":
        return tracking.TensorBoardTracker(run_name, logging_dir=folder / "tensorboard")
    if name == "wandb":
        return tracking.WandBTracker("mka", name=run_name, dir=folder)
    return tracking.TrackioTracker("mka", name=run_name)
