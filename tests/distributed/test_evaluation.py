"""A held-out split is scored once, however many ranks share it and whatever each holds of the
model."""

import json
from pathlib import Path
from typing import Any

import pytest

import checks_training as tiny
from launch import NEEDS_DEEPSPEED, OneLaunchForMany, printed

SCRIPT = Path(__file__).parent / "score_cases.py"
BLOCKS = (1, 2, 3, 5, 8, 9, 14)
"""At two blocks a batch: 1, 1, 2, 3, 4, 5 and 7 batches, so that the last turn is short and so is
the last batch."""
ROUNDING = 1e-9
"""Relative, of sums in float64 that are taken in another order."""


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "strategies",
    [("ddp", "fsdp"), pytest.param(("zero3",), marks=[pytest.mark.slow, NEEDS_DEEPSPEED])],
)
def test_every_token_is_counted_once(
    ranks: int, strategies: tuple[str, ...], launched: OneLaunchForMany
) -> None:
    """The counts exactly, on every rank; a model in shares would hang if one rank made fewer
    passes."""
    sizes = [blocks * tiny.LENGTH + 1 for blocks in BLOCKS]
    cases = json.dumps([{"strategy": strategy, "tokens": sizes} for strategy in strategies])
    ended = launched(
        f"scores-{ranks}-{strategies[0]}", lambda at: at.torchrun(ranks, SCRIPT, cases)
    )
    outcomes: list[dict[str, Any]] = printed(ended)
    assert [outcome["name"] for outcome in outcomes] == list(strategies)
    for outcome in outcomes:
        assert len(outcome["shared"]) == ranks
        for ours, alone in zip(outcome["shared"], outcome["alone"], strict=True):
            assert [held["tokens"] for held in ours] == [size - 1 for size in sizes]
            assert [held["num_bytes"] for held in ours] == [held["num_bytes"] for held in alone]
            assert [held["nats"] for held in ours] == pytest.approx(
                [held["nats"] for held in alone], rel=ROUNDING
            )
