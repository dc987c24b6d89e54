"""Results of several seeds -> one `Summary` a mechanism."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from mka.errors import unknown_name
from mka.record.mechanisms import MECHANISMS
from mka.record.results import Result


@dataclass(frozen=True)
class Mean:
    """Mean over seeds and sample standard deviation, in the unit of the values.
    `spread` is None for one seed, and for values that are not all finite."""

    value: float
    spread: float | None = None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One mechanism or variant over its seeds; units as in `Result`. Memory is None
    unless every seed measured it."""

    attention_type: str
    variant: str
    seeds: tuple[int, ...]
    train_loss: Mean
    eval_loss: Mean
    perplexity: Mean
    bits_per_byte: Mean
    train_seconds: Mean
    eval_seconds: Mean
    tokens_per_second: Mean
    memory_allocated: Mean | None
    memory_reserved: Mean | None
    parameters: int
    cache_bytes_per_token: float
    flops_per_token: float | None

    @property
    def name(self) -> str:
        """As tables write it: MKA w64."""
        return shown_name(self.attention_type, self.variant)

    @property
    def title(self) -> str:
        """In full: Memorized Key Attention, w64."""
        return MECHANISMS[self.attention_type].title + (f", {self.variant}" if self.variant else "")

    @property
    def num_seeds(self) -> int:
        """How many trainings are behind it."""
        return len(self.seeds)


def latest(results: Iterable[Result]) -> list[Result]:
    """The last result of each mechanism, variant and seed, in the order of MECHANISMS,
    each before its variants, those as they came, then by seed.

    Raises InputError for a mechanism that is not there.
    """
    last = {result.key: result for result in results}
    kinds = list(MECHANISMS)
    for result in last.values():
        if result.attention_type not in MECHANISMS:
            raise unknown_name("attention_type", result.attention_type, kinds)
    variants = ["", *dict.fromkeys(result.variant for result in last.values() if result.variant)]
    return sorted(
        last.values(),
        key=lambda r: (kinds.index(r.attention_type), variants.index(r.variant), r.seed),
    )


def summarize(results: Iterable[Result]) -> list[Summary]:
    """One Summary a mechanism and variant, in the order of `latest`; of a repeated seed
    the last result counts."""
    groups: dict[str, list[Result]] = {}
    for row in latest(results):
        groups.setdefault(row.name, []).append(row)
    return [summary(group) for group in groups.values()]


def shown_name(attention_type: str, variant: str) -> str:
    """As tables and figures write it: MKA, MKA w64."""
    return f"{attention_type.upper()} {variant}" if variant else attention_type.upper()


def summary(rows: Sequence[Result]) -> Summary:
    """The summary of one mechanism's or variant's results, one per seed."""
    return Summary(
        attention_type=rows[0].attention_type,
        variant=rows[0].variant,
        seeds=tuple(row.seed for row in rows),
        train_loss=mean([row.train_loss for row in rows]),
        eval_loss=mean([row.eval_loss for row in rows]),
        perplexity=mean([row.perplexity for row in rows]),
        bits_per_byte=mean([row.bits_per_byte for row in rows]),
        train_seconds=mean([row.train_seconds for row in rows]),
        eval_seconds=mean([row.eval_seconds for row in rows]),
        tokens_per_second=mean([row.tokens_per_second for row in rows]),
        memory_allocated=mean_if_measured([row.memory_allocated for row in rows]),
        memory_reserved=mean_if_measured([row.memory_reserved for row in rows]),
        parameters=rows[-1].parameters,
        cache_bytes_per_token=rows[-1].cache_bytes_per_token,
        flops_per_token=rows[-1].flops_per_token,
    )


def mean(values: Sequence[float]) -> Mean:
    """Mean and sample standard deviation; no spread for one value, or where a value is
    not finite."""
    return Mean(
        fmean(values),
        stdev(values) if len(values) > 1 and all(map(math.isfinite, values)) else None,
    )


def mean_if_measured(values: Sequence[float | None]) -> Mean | None:
    """The same; None unless every seed measured it."""
    measured = [value for value in values if value is not None]
    return mean(measured) if len(measured) == len(values) else None


def compact(number: float) -> str:
    """1500 as 1.5k, 2000000 as 2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"
