"""Mean and spread over seeds, order of mechanisms, what counts of repeated seeds."""

import math
import random
from collections.abc import Callable

import pytest

from mka.errors import InputError
from mka.record.mechanisms import MECHANISMS
from mka.record.results import Result
from mka.report import Mean, latest, summarize

MakeResult = Callable[..., Result]


def test_mean_and_sample_standard_deviation(make_result: MakeResult) -> None:
    rows = [make_result(seed=seed, eval_loss=loss) for seed, loss in enumerate((4.0, 5.0, 9.0))]
    (summary,) = summarize(rows)
    assert summary.eval_loss.value == pytest.approx(6.0)
    assert summary.eval_loss.spread == pytest.approx(7**0.5)
    assert summary.seeds == (0, 1, 2)
    assert summary.num_seeds == 3


def test_perplexity_is_the_mean_of_perplexities(make_result: MakeResult) -> None:
    (summary,) = summarize(
        [make_result(seed=0, perplexity=80.0), make_result(seed=1, perplexity=100.0)]
    )
    assert summary.perplexity.value == pytest.approx(90.0)


def test_one_seed_has_no_spread(make_result: MakeResult) -> None:
    (summary,) = summarize([make_result(train_loss=4.25)])
    assert summary.train_loss == Mean(4.25, None)


@pytest.mark.parametrize("spoilt", [math.nan, math.inf])
def test_a_loss_that_is_no_number_has_no_spread(make_result: MakeResult, spoilt: float) -> None:
    (summary,) = summarize(
        [make_result(seed=0, train_loss=spoilt), make_result(seed=1, train_loss=4.0)]
    )
    assert not math.isfinite(summary.train_loss.value)
    assert summary.train_loss.spread is None


def test_memory_is_none_unless_every_seed_measured_it(make_result: MakeResult) -> None:
    rows = [
        make_result(seed=0, memory_allocated=100, memory_reserved=7),
        make_result(seed=1, memory_allocated=None, memory_reserved=9),
    ]
    (summary,) = summarize(rows)
    assert summary.memory_allocated is None
    assert summary.memory_reserved is not None
    assert summary.memory_reserved.spread == pytest.approx(2**0.5)


def test_order_is_that_of_the_titles(make_result: MakeResult) -> None:
    rows = [make_result(kind, seed) for kind in MECHANISMS for seed in (2, 0)]
    random.Random(0).shuffle(rows)
    summaries = summarize(rows)
    assert [summary.attention_type for summary in summaries] == list(MECHANISMS)
    assert all(summary.seeds == (0, 2) for summary in summaries)
    assert summaries[4].name == "MKA"
    assert summaries[4].title == MECHANISMS["mka"].title


def test_the_last_of_a_repeated_seed_counts(make_result: MakeResult) -> None:
    rows = [
        make_result(eval_loss=9.0),
        make_result(seed=1, eval_loss=5.0),
        make_result(eval_loss=4.0),
    ]
    assert [row.eval_loss for row in latest(rows)] == [4.0, 5.0]
    assert summarize(rows)[0].eval_loss.value == pytest.approx(4.5)


def test_an_unknown_mechanism_is_not_dropped_silently(make_result: MakeResult) -> None:
    with pytest.raises(InputError, match=r"unknown attention_type 'mkaa'.*nearest: 'mka'"):
        summarize([make_result("mkaa")])


def test_nothing_gives_nothing() -> None:
    assert summarize([]) == []
