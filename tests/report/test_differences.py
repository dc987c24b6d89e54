"""Verdicts against mha: drawn from the interval, on the same blocks and seeds."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mka.record.results import Result, append_result
from mka.report import differences, write_report
from mka.report.differences import differences_table
from mka.report.page import difference_cells

MakeResult = Callable[..., Result]


def blocks(offset: float, noise: float = 0.0, count: int = 40, seed: int = 0) -> dict[str, Any]:
    base = np.random.default_rng(7).standard_normal(count)
    own = np.random.default_rng(seed).standard_normal(count)
    return {"eval_block_losses": (5 + base + offset + noise * own).tolist()}


def test_a_constant_difference_is_certain_whatever_the_blocks(make_result: MakeResult) -> None:
    rows = [
        make_result("mha", **blocks(0)),
        make_result("mka", **blocks(-0.1)),
        make_result("fmka", **blocks(0.2)),
    ]
    mka, fmka = differences(rows)
    assert (mka.name, fmka.name, fmka.baseline) == ("MKA", "FMKA", "MHA")
    assert mka.estimate == pytest.approx((-0.1, -0.1, -0.1))
    assert mka.line() == (
        "MKA - MHA: -0.1000 nats per token (-0.1000 to -0.1000), better (single seed)"
    )
    assert fmka.line().endswith("worse (single seed)")


def test_noise_is_not_distinguishable(make_result: MakeResult) -> None:
    rows = [make_result("mha", **blocks(0)), make_result("mka", **blocks(-0.01, noise=1.0))]
    (mka,) = differences(rows)
    assert mka.estimate.low < 0 < mka.estimate.high
    assert "not distinguishable" in mka.line()


def test_seeds_that_disagree_widen_the_interval(make_result: MakeResult) -> None:
    """One seed says better by a lot, the other worse: together nothing."""
    rows = [make_result("mha", seed, **blocks(0)) for seed in (0, 1)]
    rows += [make_result("mka", 0, **blocks(-0.3)), make_result("mka", 1, **blocks(0.2))]
    (mka,) = differences(rows)
    assert mka.seeds == 2
    assert mka.estimate.value == pytest.approx(-0.05)
    assert mka.line().endswith("not distinguishable")


def test_a_variant_is_set_against_its_mechanism_as_it_is(make_result: MakeResult) -> None:
    rows = [make_result("mha", **blocks(0)), make_result("mha", variant="w128", **blocks(0.1))]
    rows += [make_result("mka", variant="no-L2", **blocks(0.3)), make_result("mka", **blocks(0.2))]
    assert [(d.name, d.baseline, round(d.estimate.value, 6)) for d in differences(rows)] == [
        ("MHA w128", "MHA", 0.1),
        ("MKA no-L2", "MKA", 0.1),
        ("MKA", "MHA", 0.2),
    ]
    (alone,) = differences(
        [make_result("mha", **blocks(0)), make_result("mka", variant="no-L2", **blocks(0.3))]
    )
    assert (alone.name, alone.baseline) == ("MKA no-L2", "MHA")


def test_only_seeds_and_blocks_that_both_have(make_result: MakeResult) -> None:
    rows = [make_result("mha", 0, **blocks(0)), make_result("mka", 1, **blocks(0))]
    assert differences(rows) == []
    assert (
        differences([make_result("mha", **blocks(0)), make_result("mka", **blocks(0, count=39))])
        == []
    )
    assert differences([make_result("mka", **blocks(0))]) == []
    assert differences([make_result(kind, eval_block_losses=[]) for kind in ("mha", "mka")]) == []
    assert differences_table([]) == ""


def test_one_block_has_no_interval(make_result: MakeResult) -> None:
    (mka,) = differences(
        [make_result(kind, eval_block_losses=[float(len(kind))]) for kind in ("mha", "mka")]
    )
    assert "(none), no verdict" in mka.line()


def test_a_loss_that_is_no_number_gives_no_verdict(make_result: MakeResult) -> None:
    losses = blocks(0)["eval_block_losses"]
    spoilt = make_result("mka", eval_block_losses=[math.nan, *losses[1:]])
    (mka,) = differences([make_result("mha", eval_block_losses=losses), spoilt])
    assert "+nan nats per token (none), no verdict" in mka.line()
    assert "| none | no verdict |" in differences_table([mka])
    assert difference_cells(mka)[-1].value == "no verdict against MHA"


def test_the_report_has_the_table_and_says_what_one_seed_is_worth(
    make_result: MakeResult, tmp_path: Path
) -> None:
    for row in (make_result("mha", **blocks(0)), make_result("mka", **blocks(-0.1))):
        append_result(tmp_path, row)
    text = write_report(tmp_path)[0].read_text(encoding="utf-8")
    assert "| MKA | MHA | -0.1000 | -0.1000 to -0.1000 | better |" in text
    assert (
        "a bootstrap over 40 held-out blocks. With one seed, it does not cover variation between "
        "training runs." in text
    )
