"""Going on in a wrong way, planted on purpose, does not end with the same bytes: the other tests
would fail."""

from dataclasses import fields

import pytest

from resume.child import Instant
from resume.runs import Case

NOTICED = {
    "forget_moments": {"weights", "results", "curves"},
    "forget_update_counts": {"weights", "results", "curves"},
    "one_step_back": {"weights", "results", "curves"},
    "disturb_weights": {"weights", "results", "curves"},
    "forget_curve": {"curves"},
}
QUICK = ("forget_moments", "one_step_back")


@pytest.mark.parametrize(
    "defect",
    [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in NOTICED],
)
def test_a_planted_defect_is_noticed(whole: Case, case: Case, defect: str) -> None:
    assert case.start(Instant("mka.training.loop.take_step", 8)).struck
    case.go_on(defect=defect)
    ours, expected = case.outcome(), whole.outcome()
    different = {
        field.name
        for field in fields(ours)
        if getattr(ours, field.name) != getattr(expected, field.name)
    }
    assert different == NOTICED[defect]


@pytest.mark.slow
def test_a_defect_of_going_on_does_not_touch_a_run_that_is_not_interrupted(
    whole: Case, case: Case
) -> None:
    """So what the tests above notice is the going on, not the planting."""
    case.go_on(defect="forget_moments")
    assert case.outcome() == whole.outcome()
