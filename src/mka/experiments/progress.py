"""Progress of one training: a bar on a terminal, plain lines elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

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
