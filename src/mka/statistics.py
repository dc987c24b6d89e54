"""What a held-out sum says about texts that were not drawn: bootstrap intervals, and verdicts drawn from them alone.

Documents are drawn anew with replacement (Efron, 1979), because tokens of one document are not independent. A ratio of
sums is taken anew in each draw; the interval is that of its 2.5 and 97.5 percentiles. One text alone, or a sum that is
not a finite number, has no interval, and without an interval there is no verdict.
"""

import math
from typing import Literal, NamedTuple

import numpy as np

DRAWS, DRAWN_AT_ONCE = 2000, 2**22
Verdict = Literal["better", "worse", "not distinguishable", "no verdict"]


class Estimate(NamedTuple):
    """A value and its 95 % interval; low and high are NaN where there is none."""

    value: float
    low: float
    high: float

    @property
    def has_interval(self) -> bool:
        return not (math.isnan(self.value) or math.isnan(self.low) or math.isnan(self.high))

    def record(self) -> dict[str, float | None]:
        """For JSON, which has no word for NaN and infinity: None."""
        return {name: x if math.isfinite(x) else None for name, x in self._asdict().items()}


def ratio(amounts: np.ndarray, sizes: np.ndarray, seed: int = 0) -> Estimate:
    """sum(amounts) / sum(sizes), both (N,), one entry a document; a pure function of its arguments."""
    amounts, sizes = np.asarray(amounts, np.float64), np.asarray(sizes, np.float64)
    value, count = float(amounts.sum() / sizes.sum()), len(amounts)
    if count < 2 or not math.isfinite(value):
        return Estimate(value, float("nan"), float("nan"))
    rng, drawn = np.random.default_rng(seed), []
    step = max(1, DRAWN_AT_ONCE // count)
    for start in range(0, DRAWS, step):
        chosen = rng.integers(count, size=(min(step, DRAWS - start), count))
        drawn.append(amounts[chosen].sum(1) / sizes[chosen].sum(1))
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def paired(differences: np.ndarray, seed: int = 0) -> Estimate:
    """The mean of differences (S, N) between two models, trained with the same S seeds and scored on the same N texts.

    Seeds and texts are drawn anew, independently. One seed says nothing of others: the texts alone are drawn.
    """
    differences = np.asarray(differences, np.float64)
    value, (seeds, texts) = float(differences.mean()), differences.shape
    if texts < 2 or not math.isfinite(value):
        return Estimate(value, float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    of_seeds, of_texts = (rng.multinomial(n, [1 / n] * n, size=DRAWS) / n for n in (seeds, texts))
    low, high = np.percentile(((of_seeds @ differences) * of_texts).sum(1), [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def verdict(difference: Estimate) -> Verdict:
    """Of a loss minus another's on the same documents; with 0 in the interval neither is better."""
    if not difference.has_interval:
        return "no verdict"
    if difference.high < 0:
        return "better"
    return "worse" if difference.low > 0 else "not distinguishable"
