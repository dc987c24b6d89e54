"""A bar on a terminal, a few plain lines elsewhere."""

import io
import re

import pytest
from rich.console import Console

from mka.experiments.progress import rate, show_progress
from mka.training import TrainingRun
from tiny_runs import Place


def go(console: Console, steps: int) -> None:
    run = TrainingRun()
    with show_progress(console, steps) as on_step:
        for step in range(steps):
            run.losses.append(7 - 4 * (step + 1) / steps)
            run.tokens += 1000
            run.seconds += 0.5
            on_step(run)


def plain(steps: int) -> list[str]:
    console = Console(file=io.StringIO(), force_terminal=False, width=200)
    go(console, steps)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().splitlines()


def test_plain_lines_where_there_is_no_terminal() -> None:
    lines = plain(100)
    assert lines == [
        (
            f"  step {step}/100  loss {7 - step / 25:.3f}  2,000 tokens/s  {(100 - step) / 2:.0f} "
            "s left"
        )
        for step in (20, 40, 60, 80, 100)
    ]


@pytest.mark.parametrize("steps", [1, 2, 4, 5, 7, 9, 10, 11, 23, 120, 999, 20000])
def test_few_lines_and_always_the_last(steps: int) -> None:
    lines = plain(steps)
    assert min(steps, 5) <= len(lines) <= 9
    assert lines[-1].startswith(f"  step {steps}/{steps} ")
    assert lines[-1].endswith(" 0 s left")
    assert "\x1b" not in "".join(lines)
    assert "\r" not in "".join(lines)


def test_a_bar_on_a_terminal() -> None:
    console = Console(
        file=io.StringIO(), force_terminal=True, width=120, color_system=None, _environ={}
    )
    go(console, 40)
    assert isinstance(console.file, io.StringIO)
    shown = console.file.getvalue()
    assert "\x1b[" in shown
    text = re.sub(r"\x1b\[[0-9?;]*[a-zA-Z]", "", shown)
    assert "40/40" in text
    assert re.search(r"━{10,}", text)
    assert "loss 3.000  2,000 tokens/s" in text
    assert re.search(r"\d:\d\d:\d\d|-:--:--", text), "the time left"
    assert "step 40/40" not in text


def test_the_bar_goes_away_when_training_ends() -> None:
    """What stays on the screen are the results."""
    console = Console(
        file=io.StringIO(), force_terminal=True, width=120, color_system=None, _environ={}
    )
    go(console, 3)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().endswith("\x1b[2K"), "the last thing written erases the line"


def test_rate_is_over_the_whole_training() -> None:
    assert rate(TrainingRun(tokens=500, seconds=0.25)) == 2000


def test_a_run_in_a_pipe_prints_plain_lines(place: Place) -> None:
    ended = place.bench("--attention_type", "mha")
    assert "\x1b" not in ended.out
    assert "\r" not in ended.out
    assert [line.split()[1] for line in ended.out.splitlines() if line.startswith("  step")] == [
        "1/3",
        "2/3",
        "3/3",
    ]
