"""Progress of one training: a bar on a terminal, plain lines elsewhere; its curves to a
tracker, if one is asked for. results.jsonl and curves/ remain the reference."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate import tracking
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mka.errors import InputError
from mka.training import TrainingRun

LINES = 5
"""About how many plain lines a training prints."""


@contextmanager
def show_progress(console: Console, steps: int) -> Iterator[Callable[[TrainingRun], None]]:
    """Within the block, a function to call after every step.

    The loss that it shows is that of the step; tokens/s is the mean so far.
    """
    # A bar in a log file would be a line per update.
    if not console.is_terminal:
        yield lambda run: print_line(console, run, steps)
        return
    columns = (
        TextColumn("  Training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:,.0f} tokens/s "),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=steps, loss=float("nan"), rate=0.0)
        yield lambda run: progress.update(
            task, completed=len(run.losses), loss=run.losses[-1], rate=rate(run)
        )


def print_line(console: Console, run: TrainingRun, steps: int) -> None:
    """Print a plain line after every fifth of the steps and after the last one."""
    done = len(run.losses)
    if done % max(1, steps // LINES) and done != steps:
        return
    # A run that resumed carries its earlier seconds and steps, so the estimate holds
    # for it too.
    left = run.seconds / done * (steps - done)
    console.print(
        f"  step {done}/{steps}  loss {run.losses[-1]:.3f}  {rate(run):,.0f} tokens/s  "
        f"{left:.0f} s left"
    )


def rate(run: TrainingRun) -> float:
    """Training tokens per second so far."""
    return run.tokens / run.seconds


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
