"""The same rows give the same losses, however they are spread: over parts, ranks and strategies."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checks import RELATIVE_RMS, TOLERANCE
from launch import NEEDS_DEEPSPEED, Launch, OneLaunchForMany, printed
from tiny_runs import Ended

SCRIPT = Path(__file__).parent / "train_cases.py"
KINDS = ("mha", "fmka")
Case = dict[str, Any]


def cases(strategies: tuple[str, ...], **settings: Any) -> list[Case]:
    return [
        {"name": f"{strategy} {kind}", "strategy": strategy, "kind": kind, **settings}
        for strategy in strategies
        for kind in KINDS
    ]


def outcomes(
    launched: OneLaunchForMany, name: str, ranks: int, asked: list[Case]
) -> dict[str, dict[str, Any]]:
    """What each case gave, by its name."""

    def job(at: Launch) -> Ended:
        arguments = (SCRIPT, json.dumps(asked))
        return at.python(*arguments) if ranks == 1 else at.torchrun(ranks, *arguments)

    found = {outcome["name"]: outcome for outcome in printed(launched(name, job))}
    assert found.keys() == {case["name"] for case in asked}
    return found


def one_rank(launched: OneLaunchForMany, **settings: Any) -> dict[str, dict[str, Any]]:
    name = "one-" + "-".join(f"{key}-{value}" for key, value in settings.items())
    return outcomes(launched, name, 1, cases(("ddp",), **settings))


def assert_same_training(one: dict[str, Any], many: dict[str, Any], tolerance: float) -> None:
    assert many["batches"] == one["batches"]
    assert len(many["losses"]) == len(one["losses"]) == 50
    assert many["losses"] == pytest.approx(one["losses"], rel=tolerance)


@pytest.mark.parametrize(
    ("ranks", "strategies"),
    [
        pytest.param(2, ("ddp", "fsdp"), id="2 ranks"),
        pytest.param(4, ("ddp", "fsdp"), id="4 ranks", marks=pytest.mark.slow),
        pytest.param(
            2,
            ("zero1", "zero2", "zero3"),
            id="2 by DeepSpeed",
            marks=[pytest.mark.slow, NEEDS_DEEPSPEED],
        ),
        pytest.param(
            4,
            ("zero1", "zero2", "zero3"),
            id="4 by DeepSpeed",
            marks=[pytest.mark.slow, NEEDS_DEEPSPEED],
        ),
    ],
)
def test_fifty_steps_in_float32(
    ranks: int, strategies: tuple[str, ...], launched: OneLaunchForMany
) -> None:
    """Four parts on one rank, two on each of two, one on each of four."""
    one = one_rank(launched)
    many = outcomes(launched, f"float32-{ranks}-{strategies[0]}", ranks, cases(strategies))
    for strategy in strategies:
        for kind in KINDS:
            assert_same_training(
                one[f"ddp {kind}"], many[f"{strategy} {kind}"], TOLERANCE[torch.float32]
            )


def test_ddp_leaves_every_rank_with_the_same_weights(launched: OneLaunchForMany) -> None:
    many = outcomes(launched, "float32-2-ddp", 2, cases(("ddp", "fsdp")))
    for kind in KINDS:
        first, second = many[f"ddp {kind}"]["weights"]
        assert first == second
        first, second = many[f"fsdp {kind}"]["weights"]
        assert first != second  # each holds its own share


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategies", [("ddp", "fsdp"), pytest.param(("zero2", "zero3"), marks=NEEDS_DEEPSPEED)]
)
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_on_two_ranks(
    precision: str, strategies: tuple[str, ...], launched: OneLaunchForMany
) -> None:
    one = one_rank(launched)
    many = outcomes(
        launched, f"{precision}-2-{strategies[0]}", 2, cases(strategies, precision=precision)
    )
    for strategy in strategies:
        for kind in KINDS:
            assert_same_training(
                one[f"ddp {kind}"], many[f"{strategy} {kind}"], RELATIVE_RMS[torch.bfloat16]
            )


@pytest.mark.slow
@pytest.mark.parametrize(
    "strategies", [("ddp", "fsdp"), pytest.param(("zero2",), marks=NEEDS_DEEPSPEED)]
)
def test_an_overflow_on_one_rank_is_skipped_on_all(
    strategies: tuple[str, ...], launched: OneLaunchForMany
) -> None:
    asked = cases(strategies, precision="float16", planted_rank=1, steps=12)
    many = outcomes(launched, f"overflow-{strategies[0]}", 2, asked)
    for outcome in many.values():
        assert outcome["skipped"] == [1, 1], outcome["name"]
        assert all(loss < 10 for loss in outcome["losses"])


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(launched: OneLaunchForMany) -> None:
    one = one_rank(launched)
    many = outcomes(launched, "checkpointing", 2, cases(("ddp", "fsdp"), checkpointing=True))
    for strategy in ("ddp", "fsdp"):
        for kind in KINDS:
            assert_same_training(
                one[f"ddp {kind}"], many[f"{strategy} {kind}"], TOLERANCE[torch.float32]
            )
