"""Progress of one training: a bar on a terminal, plain lines elsewhere."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mka.training import TrainingRun

LINES = 5
"""Plain lines for one training."""


@contextmanager
def show_progress(console: Console, steps: int) -> Iterator[Callable[[TrainingRun], None]]:
    """A function to call after every step; loss is that of the step, tokens/s the mean so far."""
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
        yield lambda run: progress.update(task, completed=len(run.losses), loss=run.losses[-1], rate=rate(run))


def print_line(console: Console, run: TrainingRun, steps: int) -> None:
    done = len(run.losses)
    if done % max(1, steps // LINES) and done != steps:
        return
    left = run.seconds / done * (steps - done)
    console.print(f"  step {done}/{steps}  loss {run.losses[-1]:.3f}  {rate(run):,.0f} tokens/s  {left:.0f} s left")


def rate(run: TrainingRun) -> float:
    """Training tokens per second so far."""
    return run.tokens / run.seconds
