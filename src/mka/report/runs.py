"""Run folders as the page reads them: results, curves, costs, routers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mka.limits import InputError
from mka.observations import Cost, Routing, read_costs, read_routing
from mka.report.curves import mean_curve
from mka.report.summary import Summary, latest, summarise
from mka.results import CurvePoint, Result, read_curve, read_results, remarks, results_path

Arm = tuple[str, str]
"""A mechanism and its variant, "" for none."""


@dataclass(frozen=True)
class Run:
    """One folder. `name` tells it from the others beside it; `curves` are means over seeds; `remarks` say what is lost
    or cut in it."""

    name: str
    rows: list[Result]
    curves: dict[Arm, list[CurvePoint]]
    costs: list[Cost]
    routings: list[Routing]
    remarks: list[str]

    @property
    def summaries(self) -> list[Summary]:
        return summarise(self.rows)

    @property
    def arms(self) -> dict[str, Arm]:
        """By the name that files have."""
        return {row.name: (row.attention_type, row.variant) for row in self.rows}


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Raises InputError for a folder that is given twice or without results, and for damaged files, naming them."""
    resolved = [folder.resolve() for folder in folders]
    for folder in folders:
        if resolved.count(folder.resolve()) > 1:
            raise InputError(f"{folder} is given twice; give each folder once")
    return [read_run(folder, name) for folder, name in zip(folders, names_of(resolved), strict=True)]


def names_of(folders: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell them all apart."""
    count = next(n for n in range(1, 1000) if len({folder.parts[-n:] for folder in folders}) == len(folders))
    return ["/".join(folder.parts[-count:]) for folder in folders]


def read_run(folder: Path, name: str) -> Run:
    rows = latest(read_results(folder))
    if not rows:
        raise InputError(f"{results_path(folder)} holds no finished result yet; run `mka bench` on this folder again")
    found = [read_routing(folder, *row.key) for row in rows]
    return Run(
        name=name,
        rows=rows,
        curves=seed_means(folder, rows),
        costs=read_costs(folder),
        routings=[routing for routing in found if routing is not None],
        remarks=remarks(folder),
    )


def seed_means(folder: Path, rows: Sequence[Result]) -> dict[Arm, list[CurvePoint]]:
    """The mean curve of each mechanism and variant over its seeds."""
    groups: dict[Arm, list[Result]] = {}
    for row in rows:
        groups.setdefault((row.attention_type, row.variant), []).append(row)
    return {arm: mean_curve([read_curve(folder, *row.key) for row in group]) for arm, group in groups.items()}
