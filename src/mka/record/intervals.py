"""Bootstrap intervals over documents, and the verdicts that follow from them.

Documents are resampled with replacement (Efron, 1979), because the tokens of one
document are not independent. The ratio of sums is computed again in each resample; the
interval reaches from its 2.5 to its 97.5 percentile. One text alone, or a sum that is
not finite, has no interval, and without an interval there is no verdict.
"""

import math
from typing import Literal, NamedTuple

import numpy as np

DRAWS, DRAWN_AT_ONCE = 2000, 2**22
Verdict = Literal["better", "worse", "not distinguishable", "no verdict"]


class Estimate(NamedTuple):
    """A value and its 95 % interval; low and high are NaN if there is none."""

    value: float
    low: float
    high: float

    @property
    def has_interval(self) -> bool:
        """Whether there is an interval; its ends may be infinite."""
        return not (math.isnan(self.value) or math.isnan(self.low) or math.isnan(self.high))

    def record(self) -> dict[str, float | None]:
        """The fields by name, for JSON; None instead of NaN and infinity, which JSON
        lacks."""
        return {name: x if math.isfinite(x) else None for name, x in self._asdict().items()}


def ratio(amounts: np.ndarray, sizes: np.ndarray, seed: int = 0) -> Estimate:
    """Estimate sum(amounts) / sum(sizes); both are (N,), one entry per document.

    The same arguments always give the same interval.
    """
    amounts, sizes = np.asarray(amounts, np.float64), np.asarray(sizes, np.float64)
    value, count = float(amounts.sum() / sizes.sum()), len(amounts)
    # With one document every resample is that document, and the interval would have no
    # width.
    if count < 2 or not math.isfinite(value):
        return Estimate(value, float("nan"), float("nan"))
    rng, drawn = np.random.default_rng(seed), []
    # Resamples are drawn in groups, which bounds memory for many documents.
    step = max(1, DRAWN_AT_ONCE // count)
    for start in range(0, DRAWS, step):
        chosen = rng.integers(count, size=(min(step, DRAWS - start), count))
        drawn.append(amounts[chosen].sum(1) / sizes[chosen].sum(1))
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def paired(differences: np.ndarray, seed: int = 0) -> Estimate:
    """Estimate the mean of differences (S, N) between two models over S seeds and N
    texts.

    Both models were trained with the same seeds and scored on the same texts. Seeds and
    texts are resampled independently. With one seed only texts are resampled, so the
    interval then does not cover other seeds.
    """
    differences = np.asarray(differences, np.float64)
    value, (seeds, texts) = float(differences.mean()), differences.shape
    if texts < 2 or not math.isfinite(value):
        return Estimate(value, float("nan"), float("nan"))
    rng = np.random.default_rng(seed)
    # A resample is the weight of each seed and text, so a mean is two products of
    # matrices.
    of_seeds, of_texts = (rng.multinomial(n, [1 / n] * n, size=DRAWS) / n for n in (seeds, texts))
    low, high = np.percentile(((of_seeds @ differences) * of_texts).sum(1), [2.5, 97.5])
    return Estimate(value, float(low), float(high))


def verdict(difference: Estimate) -> Verdict:
    """The verdict on a loss minus another one on the same documents: lower is better.

    If the interval contains 0, the two are not distinguishable.
    """
    if not difference.has_interval:
        return "no verdict"
    if difference.high < 0:
        return "better"
    return "worse" if difference.low > 0 else "not distinguishable"
