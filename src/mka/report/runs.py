"""Run folders as the page reads them: results, curves, costs, routers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite
from pathlib import Path
from statistics import fmean

from mka.errors import InputError, printable
from mka.record.results import (
    Cost,
    CurvePoint,
    Result,
    Routing,
    no_results,
    read_costs,
    read_curve,
    read_results,
    read_routing,
    remarks,
)
from mka.report.summary import Summary, latest, summarize

SMOOTHING = 0.04
"""Half of the smoothing window, as a share of the curve."""
CUT = 0.2
"""The share of a curve, from its start, that may reach above a figure."""


ArmKey = tuple[str, str]
"""A mechanism and its variant, "" for none."""


@dataclass(frozen=True)
class Run:
    """One folder. `name` tells it from the others beside it; `curves` are means over
    seeds; `remarks` say what is lost or cut in it."""

    name: str
    rows: list[Result]
    curves: dict[ArmKey, list[CurvePoint]]
    costs: list[Cost]
    routings: list[Routing]
    remarks: list[str]

    @cached_property
    def summaries(self) -> list[Summary]:
        """Mean and spread of each mechanism and variant."""
        return summarize(self.rows)

    @property
    def arms(self) -> dict[str, ArmKey]:
        """By the name that files have."""
        return {row.name: (row.attention_type, row.variant) for row in self.rows}


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Raises InputError for a folder that is given twice or without results, and for
    damaged files, naming them."""
    resolved = [folder.resolve() for folder in folders]
    for folder in folders:
        if resolved.count(folder.resolve()) > 1:
            raise InputError(f"{folder} is given twice; give each folder once")
    return [
        read_run(folder, name) for folder, name in zip(folders, names_of(resolved), strict=True)
    ]


def names_of(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell them all apart."""
    count = next(
        n for n in range(1, 1000) if len({folder.parts[-n:] for folder in folders}) == len(folders)
    )
    return [printable("/".join(folder.parts[-count:])) for folder in folders]


def read_run(folder: Path, name: str) -> Run:
    """One folder, every file of it read once. Raises InputError for a folder without
    results."""
    rows = latest(read_results(folder))
    if not rows:
        raise no_results(folder)
    found = [read_routing(folder, *row.key) for row in rows]
    return Run(
        name=name,
        rows=rows,
        curves=seed_means(folder, rows),
        costs=read_costs(folder),
        routings=[routing for routing in found if routing is not None],
        remarks=remarks(folder),
    )


def seed_means(folder: Path, rows: Sequence[Result]) -> dict[ArmKey, list[CurvePoint]]:
    """The mean curve of each mechanism and variant over its seeds."""
    groups: dict[ArmKey, list[Result]] = {}
    for row in rows:
        groups.setdefault((row.attention_type, row.variant), []).append(row)
    return {
        arm: mean_curve([read_curve(folder, *row.key) for row in group])
        for arm, group in groups.items()
    }


def mean_curve(curves: Iterable[Sequence[CurvePoint]]) -> list[CurvePoint]:
    """The mean over seeds at every step that all curves hold; curves without points do
    not count, nor do points whose losses are not numbers."""
    by_step = [{point.step: point for point in curve if finite(point)} for curve in curves if curve]
    if not by_step:
        return []
    steps = sorted(set(by_step[0]).intersection(*by_step[1:]))
    return [mean_point([curve[step] for curve in by_step]) for step in steps]


def finite(point: CurvePoint) -> bool:
    """Whether all losses of a point are numbers."""
    return all(isfinite(loss) for loss in (point.train_loss, point.eval_loss) if loss is not None)


def mean_point(points: Sequence[CurvePoint]) -> CurvePoint:
    """The mean of one step's points over seeds."""
    return replace(
        points[0],
        seconds=fmean(point.seconds for point in points),
        train_loss=mean_or_none([point.train_loss for point in points]),
        eval_loss=mean_or_none([point.eval_loss for point in points]),
    )


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """The mean; None unless all are known."""
    known = [value for value in values if value is not None]
    return fmean(known) if len(known) == len(values) else None


def smooth(values: Sequence[float]) -> list[float]:
    """Running mean; at the start the window narrows, so that the steep fall there is
    not flattened."""
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
