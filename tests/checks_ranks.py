"""What several ranks must agree with one: the checks that the negative tests turn red."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import nn

import checks_training as tiny
from checks import TOLERANCE
from mka.data import evaluation_batches
from mka.distributed import Ranks
from mka.evaluation import HeldOutLoss
from mka.training import TrainingPlan, TrainingRun, train
from thread_ranks import all_returned, on_ranks

ScoreOnRank = Callable[..., HeldOutLoss]


def models_of(count: int) -> list[nn.Module]:
    """The same for each rank, made here: they are drawn from a random state that threads would
    share."""
    return [tiny.tiny_model() for _ in range(count)]


def assert_ranks_score_every_token_once(score: ScoreOnRank, count: int, batch_size: int) -> None:
    """Nine blocks, spread over `count` ranks: the counts of one rank exactly, its nats within the
    tolerance."""
    split, models = tiny.held_out_split(150), models_of(count)

    def work(ranks: Ranks) -> HeldOutLoss:
        batches = evaluation_batches(split, tiny.LENGTH, batch_size)
        return score(models[ranks.rank], batches, tiny.CPU, None, ranks)

    alone = score(
        tiny.tiny_model(), evaluation_batches(split, tiny.LENGTH, 9), tiny.CPU, None, Ranks()
    )
    assert alone.tokens == 9 * tiny.LENGTH
    for held in all_returned(on_ranks(count, work)):
        assert (held.tokens, held.num_bytes) == (alone.tokens, alone.num_bytes), (
            "a token is counted twice or not at all"
        )
        assert held.nats == pytest.approx(alone.nats, rel=TOLERANCE[torch.float32])
        assert held.block_losses == pytest.approx(alone.block_losses, rel=TOLERANCE[torch.float32])


def assert_first_step_is_that_of_one_rank(
    count: int, accumulation: int = 1, plan_of: Callable[[Ranks], TrainingPlan] | None = None
) -> None:
    """The loss and what is counted, whatever share of the rows a rank takes, in whatever parts."""
    models = iter(models_of(count))

    def usual(ranks: Ranks) -> TrainingPlan:
        rows = 6 * count * accumulation
        options = {"accumulation": accumulation}
        return tiny.plan(
            steps=1, ranks=ranks, batch_at=lambda step: tiny.batch_at(step, rows), **options
        )

    def work(ranks: Ranks) -> TrainingRun:
        return train(next(models), (plan_of or usual)(ranks), lambda: 0.0)

    alone = train(tiny.tiny_model(), replace(usual(Ranks()), accumulation=1), lambda: 0.0)
    runs = all_returned(on_ranks(count, work))
    assert len({run.losses[0] for run in runs}) == 1, "the ranks disagree on the loss"
    for run in runs:
        assert run.tokens == alone.tokens
        error = abs(run.losses[0] / alone.losses[0] - 1)
        assert error <= TOLERANCE[torch.float32], f"the loss is off by {error:.0e}"
