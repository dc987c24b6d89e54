"""What a reader must know before believing a figure."""

from collections.abc import Iterator, Sequence
from math import isfinite

from mka.memory.options import LEVELS
from mka.record.intervals import verdict
from mka.record.results import COLLAPSED, flat
from mka.report.differences import differences
from mka.report.runs import Run
from mka.report.summary import shown_name

BUSY_CORES = 0.25
"""Cores that others keep busy, from which times are reported as disturbed."""
LOSSES = ("train_loss", "eval_loss", "perplexity", "bits_per_byte")
COMPARABLE = (
    "data.corpus_fingerprint",
    "data.tokenizer",
    "data.vocab_size",
    "sequence_length",
    "max_steps",
    "epochs",
)
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
    """Settings in which runs differ and without which losses do not compare."""
    settings = [flat(run.rows[0].config) for run in runs]
    names = [name for name in COMPARABLE if len({str(values.get(name)) for values in settings}) > 1]
    if names:
        yield f"The runs differ in {', '.join(names)}: their losses do not compare."


def lost(run: Run) -> Iterator[str]:
    """What is missing or cut in the folder."""
    for remark in run.remarks:
        yield f"{remark}."


def not_finite(run: Run) -> Iterator[str]:
    """Losses that are NaN or infinite."""
    for row in run.rows:
        names = [name for name in LOSSES if not isfinite(getattr(row, name))]
        if names:
            name = shown_name(row.attention_type, row.variant)
            which = " and ".join(names)
            are = "is" if len(names) == 1 else "are"
            yield f"{name}, seed {row.seed}: {which} {are} NaN or infinite; shown unchanged."


def few_seeds(run: Run) -> Iterator[str]:
    """Intervals of one seed say nothing about other trainings."""
    if len({row.seed for row in run.rows}) == 1:
        yield "One seed: the intervals cover variation in text, not between training runs."


def indistinct(run: Run) -> Iterator[str]:
    """Pairs whose interval holds 0, or that have none."""
    pairs: dict[str, list[str]] = {}
    for d in differences(run.rows):
        pairs.setdefault(verdict(d.estimate), []).append(f"{d.name} and {d.baseline}")
    if same := pairs.get("not distinguishable"):
        yield f"Not distinguishable, the interval holds 0: {'; '.join(same)}."
    if unknown := pairs.get("no verdict"):
        yield (
            "No verdict, as one held-out block or a loss that is not a number has no interval: "
            f"{'; '.join(unknown)}."
        )


def collapsed(run: Run) -> Iterator[str]:
    """Routers that use one level alone."""
    found: dict[tuple[str, str], list[str]] = {}
    for routing in run.routings:
        layers: dict[str, list[str]] = {}
        for layer, entropy in enumerate(routing.entropy):
            if entropy is not None and entropy < COLLAPSED:
                means = [
                    sum(piece[level] for piece in routing.shares[layer])
                    for level in range(len(LEVELS))
                ]
                layers.setdefault(LEVELS[means.index(max(means))], []).append(str(layer))
        for level, numbers in layers.items():
            where = f"seed {routing.seed} in layer {' and '.join(numbers)}"
            found.setdefault((shown_name(*run.arms[routing.name]), level), []).append(where)
    for (name, level), places in found.items():
        yield f"The router of {name} has collapsed onto {level}: {'; '.join(places)}."


def busy(run: Run) -> Iterator[str]:
    """Trainings that other processes disturbed."""
    known = [row.busy_cores for row in run.rows if row.busy_cores is not None]
    disturbed = [cores for cores in known if cores > BUSY_CORES]
    if disturbed:
        yield (
            f"The machine was busy: during {len(disturbed)} of {len(run.rows)} trainings, other "
            f"processes used up to {max(disturbed):.1f} cores, so times and tokens/s are those of "
            "a disturbed machine."
        )


def changed(run: Run) -> Iterator[str]:
    """Source trees with local changes, and results of several commits."""
    commits = {str(row.environment.get("commit")) for row in run.rows}
    dirty = sorted(commit for commit in commits if commit.endswith("+"))
    if dirty:
        yield f"Ran with local changes: {', '.join(dirty)}."
    if len(commits) > 1:
        yield f"Ran with {len(commits)} commits: {', '.join(sorted(commits))}."
