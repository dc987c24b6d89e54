"""Two ranks, one of which is killed: the other ends too, and the same command ends with the same
bytes."""

import random

import pytest

from disks import files
from mka.record.folders import claimed
from resume.child import Instant, Moment
from resume.runs import Case

STEP = "mka.training.loop.take_step"
PLACES: list[tuple[str, int, Moment]] = [
    (STEP, 0, "before"),
    (STEP, 1, "after"),
    ("mka.training.checkpoint.save_file", 0, "within"),
    ("mka.experiments.benchmark.evaluate", 1, "before"),
    ("mka.experiments.benchmark.make_model", 1, "before"),
    ("mka.experiments.benchmark.append_result", 0, "before"),
    ("mka.record.folders.write_atomically", 0, "after"),
    ("mka.data.tokens.write_split", 0, "before"),
]
"""Function, rank, when. Which call it is, is drawn; a first rank alone writes, and all its calls
come before the ranks
part: what draws the report after that is not among them."""


@pytest.mark.parametrize(
    "number", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, len(PLACES)))]
)
def test_one_rank_is_killed(whole_on_two: Case, case_on_two: Case, number: int) -> None:
    function, rank, moment = PLACES[number]
    call = random.Random(number).randint(1, whole_on_two.calls()[function])
    killed = case_on_two.start(Instant(function, call, moment, rank=rank))
    assert killed.struck, killed.printed
    assert killed.statuses[1 - rank] == 1, killed.printed
    assert "Traceback" not in killed.printed, killed.printed
    case_on_two.go_on()
    assert case_on_two.outcome() == whole_on_two.outcome()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_torchrun_without_restarts(whole_on_two: Case, case_on_two: Case, seed: int) -> None:
    """Either rank, in either mechanism; the same command by the same launcher."""
    draw = random.Random(seed)
    killed = case_on_two.torchrun(Instant(STEP, draw.randint(1, 24), rank=seed))
    assert killed.statuses != [0]
    again = case_on_two.torchrun()
    assert again.statuses == [0], again.printed
    assert "Traceback" not in again.printed
    assert case_on_two.outcome() == whole_on_two.outcome()


@pytest.mark.parametrize("late", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_torchrun_restarts_the_ranks(whole_on_two: Case, case_on_two: Case, late: int) -> None:
    """With --max-restarts nobody has to give the command again, whichever rank is the last to come
    back."""
    instant = Instant(STEP, 8, rank=1, once=str(case_on_two.home / "killed-once"))
    ended = case_on_two.torchrun(instant, late_rank=late, restarts=3)
    assert ended.statuses == [0], ended.printed
    assert "Resuming after step 6 of 12" in ended.printed
    assert "while the ranks were joining" not in ended.printed, (
        "an attempt was spent on the address of a dead rank"
    )
    assert case_on_two.outcome() == whole_on_two.outcome()


def test_a_folder_that_another_run_writes_to(case_on_two: Case) -> None:
    """Both ranks end with status 2 and one of them says why, before anything is written; then the
    command works."""
    with claimed(case_on_two.folder):
        refused = case_on_two.start()
        assert refused.statuses == [2, 2], refused.printed
        said = (
            f"another run is writing to {case_on_two.folder}; wait until it has ended, or "
            "choose another --output_dir"
        )
        assert refused.printed.splitlines() == [f"benchmark.py: {said}"]
        assert files(case_on_two.folder) == {".lock"}
    case_on_two.go_on()
