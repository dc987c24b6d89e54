"""Intervals against what is known of normal numbers, and the verdicts drawn from them."""

import math

import numpy as np
import pytest

from mka.record.intervals import Estimate, paired, ratio, verdict


def test_the_interval_of_a_mean() -> None:
    """Of 400 numbers with deviation 2: the mean, 1.96 * 2 / 20 to both sides."""
    x = np.random.default_rng(0).standard_normal(400)
    x = 5 + 2 * (x - x.mean()) / x.std()
    value, low, high = ratio(x, np.ones(400))
    assert value == pytest.approx(5)
    assert low == pytest.approx(5 - 0.196, abs=0.01)
    assert high == pytest.approx(5 + 0.196, abs=0.01)


def test_nineteen_intervals_of_twenty_hold_the_truth() -> None:
    draws = np.random.default_rng(1).standard_normal((300, 50))
    held = [
        low <= 0 <= high
        for _, low, high in (ratio(x, np.ones(50), seed) for seed, x in enumerate(draws))
    ]
    assert 0.90 < np.mean(held) < 0.98


def test_a_ratio_weighs_documents_by_their_size() -> None:
    assert ratio(np.array([10.0, 2.0]), np.array([10, 1])).value == pytest.approx(12 / 11)


def test_the_same_numbers_give_the_same_interval() -> None:
    x = np.random.default_rng(2).standard_normal(30)
    assert ratio(x, np.ones(30)) == ratio(x, np.ones(30))


def test_one_document_has_no_interval() -> None:
    value, low, high = ratio(np.array([3.0]), np.array([2.0]))
    assert value == 1.5
    assert math.isnan(low)
    assert math.isnan(high)


def test_paired_differences_of_one_seed_are_those_of_their_texts() -> None:
    x = np.random.default_rng(3).standard_normal(500)
    ours, plain = paired(x[None]), ratio(x, np.ones(500))
    assert ours.value == pytest.approx(plain.value)
    assert ours.low == pytest.approx(plain.low, abs=0.01)
    assert ours.high == pytest.approx(plain.high, abs=0.01)


def test_paired_differences_know_of_seeds() -> None:
    """Five seeds whose means are 1 to 5, many texts without noise: the deviation of a mean of five,
    0.63 times 1.96."""
    value, low, high = paired(np.arange(1.0, 6.0)[:, None].repeat(50, 1))
    assert value == 3
    assert low == pytest.approx(3 - 1.24, abs=0.21)
    assert high == pytest.approx(3 + 1.24, abs=0.21)


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (-2.0, -1.0, "better"),
        (1.0, 2.0, "worse"),
        (-1.0, 1.0, "not distinguishable"),
        (0.0, 1.0, "not distinguishable"),
        (math.nan, math.nan, "no verdict"),
        (math.nan, -1.0, "no verdict"),
    ],
)
def test_verdicts(low: float, high: float, word: str) -> None:
    assert verdict(Estimate(0.0, low, high)) == word


@pytest.mark.parametrize("spoilt", [math.nan, math.inf, -math.inf])
def test_a_sum_that_is_no_number_has_no_interval_and_no_verdict(spoilt: float) -> None:
    x = np.array([1.0, spoilt, 2.0])
    for estimate in (ratio(x, np.ones(3)), paired(np.stack([x, x]))):
        assert not math.isfinite(estimate.value)
        assert not estimate.has_interval
        assert verdict(estimate) == "no verdict"
        assert set(estimate.record().values()) == {None}


def test_equal_documents_have_an_interval_of_no_width() -> None:
    """Without spread there is nothing that other draws could give: the interval is the value, and 0
    is in it or not."""
    for value, word in ((0.0, "not distinguishable"), (-0.5, "better")):
        for estimate in (ratio(np.full(4, value), np.ones(4)), paired(np.full((2, 4), value))):
            assert estimate == pytest.approx((value, value, value))
            assert verdict(estimate) == word
    assert Estimate(1.0, 0.5, math.inf).record() == {"value": 1.0, "low": 0.5, "high": None}
