"""What a reader must know before believing a figure."""

from collections.abc import Iterator, Sequence
from math import isfinite
from typing import Any

from mka.observations import COLLAPSED
from mka.report.differences import differences
from mka.report.runs import Run
from mka.report.summary import shown_name
from mka.results import flat
from mka.statistics import verdict

BUSY_CORES = 0.25
"""Cores that others keep busy, from which on times are said to be disturbed."""
LEVELS = ("L1", "L2", "L3")
LOSSES = ("train_loss", "eval_loss", "perplexity", "bits_per_byte")
COMPARABLE = ("data.corpus_fingerprint", "data.tokenizer", "data.vocab_size", "sequence_length", "max_steps", "epochs")
"""Settings without which two runs' losses do not compare."""


def warnings(runs: Sequence[Run]) -> list[str]:
    """One sentence each; of several runs it says which."""
    found = [
        f"{run.name}: {text}" if len(runs) > 1 else text
        for run in runs
        for of in (lost, not_finite, few_seeds, indistinct, collapsed, busy, changed)
        for text in of(run)
    ]
    return [*different(runs), *found]


def different(runs: Sequence[Run]) -> Iterator[str]:
    settings = [flat(run.rows[0].config) for run in runs]
    names = [name for name in COMPARABLE if len({str(values.get(name)) for values in settings}) > 1]
    if names:
        yield f"The runs differ in {', '.join(names)}: their losses do not compare."


def lost(run: Run) -> Iterator[str]:
    for remark in run.remarks:
        yield f"{remark}."


def not_finite(run: Run) -> Iterator[str]:
    for row in run.rows:
        names = [name for name in LOSSES if not isfinite(getattr(row, name))]
        if names:
            name = shown_name(row.attention_type, row.variant)
            yield f"{name}, seed {row.seed}: {', '.join(names)} is not a number; it is shown as it is."


def few_seeds(run: Run) -> Iterator[str]:
    if len({row.seed for row in run.rows}) == 1:
        yield "One seed: the intervals know of other texts, not of other trainings."


def indistinct(run: Run) -> Iterator[str]:
    pairs: dict[str, list[str]] = {}
    for d in differences(run.rows):
        pairs.setdefault(verdict(d.estimate), []).append(f"{d.name} and {d.baseline}")
    if same := pairs.get("not distinguishable"):
        yield f"Not distinguishable, the interval holds 0: {'; '.join(same)}."
    if unknown := pairs.get("no verdict"):
        yield f"No verdict, one held-out block or a loss that is no number has no interval: {'; '.join(unknown)}."


def collapsed(run: Run) -> Iterator[str]:
    found: dict[tuple[str, str], list[str]] = {}
    for routing in run.routings:
        layers: dict[str, list[str]] = {}
        for layer, entropy in enumerate(routing.entropy):
            if entropy is not None and entropy < COLLAPSED:
                means = [sum(piece[level] for piece in routing.shares[layer]) for level in range(len(LEVELS))]
                layers.setdefault(LEVELS[means.index(max(means))], []).append(str(layer))
        for level, numbers in layers.items():
            where = f"seed {routing.seed} in layer {' and '.join(numbers)}"
            found.setdefault((shown_name(*run.arms[routing.name]), level), []).append(where)
    for (name, level), places in found.items():
        yield f"The router of {name} has collapsed onto {level}: {'; '.join(places)}."


def busy(run: Run) -> Iterator[str]:
    known = [row.busy_cores for row in run.rows if row.busy_cores is not None]
    disturbed = [cores for cores in known if cores > BUSY_CORES]
    if disturbed:
        yield (
            f"The machine was busy: beside {len(disturbed)} of {len(run.rows)} trainings other processes kept up to "
            f"{max(disturbed):.1f} cores at work, so times and tokens/s are those of a disturbed machine."
        )


def changed(run: Run) -> Iterator[str]:
    commits: set[Any] = {row.environment.get("commit") for row in run.rows}
    dirty = sorted(str(commit) for commit in commits if str(commit).endswith("+"))
    if dirty:
        yield f"Ran with local changes: {', '.join(dirty)}."
    if len(commits) > 1:
        yield f"Ran with {len(commits)} commits: {', '.join(sorted(map(str, commits)))}."
