"""Seeds averaged, lines smoothed, axes cut."""

import pytest

from mka.record.results import CurvePoint
from mka.report.runs import cut, mean_curve, smooth


def point(
    step: int, train: float | None, held_out: float | None = None, seconds: float = 1.0
) -> CurvePoint:
    return CurvePoint(
        step=step, tokens=10 * step, seconds=seconds * step, train_loss=train, eval_loss=held_out
    )


def test_mean_curve_is_over_the_steps_that_all_seeds_hold() -> None:
    short = [point(1, 4.0), point(2, 3.0, 3.5)]
    long = [point(1, 6.0, seconds=3.0), point(2, 5.0, 4.5, seconds=3.0), point(3, 1.0)]
    assert mean_curve([long, [], short]) == [
        point(1, 5.0, seconds=2.0),
        point(2, 4.0, 4.0, seconds=2.0),
    ]


def test_a_value_that_one_seed_lacks_is_not_averaged() -> None:
    (mean,) = mean_curve([[point(1, 4.0, 4.0)], [point(1, None, None)]])
    assert (mean.train_loss, mean.eval_loss) == (None, None)


def test_mean_of_no_curves_is_empty() -> None:
    assert mean_curve([]) == mean_curve([[], []]) == []


def test_smoothing_keeps_the_ends_of_the_fall_and_a_straight_line() -> None:
    assert smooth([]) == []
    assert smooth([5.0, 1.0]) == [5.0, 1.0]
    steep = [100.0, *[1.0] * 99]
    assert smooth(steep)[0] == 100.0
    line = [float(i) for i in range(100)]
    assert smooth(line)[:96] == pytest.approx(line[:96])
    assert smooth([0.0, 2.0] * 100)[50:150] == pytest.approx([1.0] * 100, abs=0.1)


def test_cut_leaves_out_the_first_steps_only() -> None:
    low, high = cut([[point(step, 10.0 if step <= 15 else 4.0) for step in range(1, 101)], []])
    assert low < 4.0 < high < 5.0
    assert cut([]) == pytest.approx((-0.05, 1.05))
    low, high = cut([[point(1, 4.0, 6.0)]])
    assert low < 4.0 < 6.0 < high
