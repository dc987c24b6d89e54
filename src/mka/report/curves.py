"""Curves of several seeds -> one curve to draw."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import isfinite
from statistics import fmean

from mka.results import CurvePoint

SMOOTHING = 0.04
"""Half of the smoothing window, as a share of the curve."""
CUT = 0.2
"""The share of a curve, from its start, that may reach above a figure."""


def mean_curve(curves: Iterable[Sequence[CurvePoint]]) -> list[CurvePoint]:
    """The mean over seeds at every step that all curves hold; curves without points do not count, nor do points whose
    losses are not numbers."""
    by_step = [{point.step: point for point in curve if finite(point)} for curve in curves if curve]
    if not by_step:
        return []
    steps = sorted(set(by_step[0]).intersection(*by_step[1:]))
    return [mean_point([curve[step] for curve in by_step]) for step in steps]


def finite(point: CurvePoint) -> bool:
    return all(isfinite(loss) for loss in (point.train_loss, point.eval_loss) if loss is not None)


def mean_point(points: Sequence[CurvePoint]) -> CurvePoint:
    return replace(
        points[0],
        seconds=fmean(point.seconds for point in points),
        train_loss=mean_or_none([point.train_loss for point in points]),
        eval_loss=mean_or_none([point.eval_loss for point in points]),
    )


def mean_or_none(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def smooth(values: Sequence[float]) -> list[float]:
    """Running mean; at the start the window narrows, so that the steep fall there is not flattened."""
    half = round(SMOOTHING * len(values))
    widths = [min(index, half) for index in range(len(values))]
    return [fmean(values[index - width : index + width + 1]) for index, width in enumerate(widths)]


def cut(curves: Iterable[Sequence[CurvePoint]]) -> tuple[float, float]:
    """Limits of the loss axis: what CUT leaves, train losses smoothed."""
    seen: list[float] = []
    for points in curves:
        train = smooth([point.train_loss for point in points if point.train_loss is not None])
        held_out = [point.eval_loss for point in points if point.eval_loss is not None]
        seen += [*train[int(CUT * len(train)) :], *held_out[int(CUT * len(held_out)) :]]
    low, high = min(seen, default=0.0), max(seen, default=1.0)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin
