"""Held-out loss: by hand, every token once, and on the validation split alone."""

import math
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import checks_training as tiny
from checks import TOLERANCE, close
from checks_ranks import assert_ranks_score_every_token_once, models_of
from mka.data import evaluation_batches
from mka.distributed import Ranks
from mka.evaluation import HeldOutLoss, held_out_loss
from mka.models import next_token_loss
from thread_ranks import all_returned, on_ranks


@pytest.mark.parametrize("num_tokens", [tiny.LENGTH + 1, 2 * tiny.LENGTH, 150])
@pytest.mark.parametrize("kind", ["mha", "mka", "fmka"])
def test_equals_a_computation_by_hand(kind: str, num_tokens: int) -> None:
    model = tiny.tiny_model(kind).eval()
    nn.init.normal_(model.get_parameter("transformer.wte.weight"), std=0.3)
    tiny.assert_loss_is_of_the_text_alone(model, tiny.held_out_split(num_tokens))


@pytest.mark.parametrize("batch_size", [1, 2, 4, 9, 50])
def test_the_batch_size_does_not_matter(batch_size: int) -> None:
    split, model = tiny.held_out_split(150), tiny.tiny_model()
    found = held_out_loss(model, evaluation_batches(split, tiny.LENGTH, batch_size), tiny.CPU)
    one = held_out_loss(model, evaluation_batches(split, tiny.LENGTH, 1), tiny.CPU)
    assert (found.tokens, found.num_bytes) == (one.tokens, one.num_bytes)
    assert found.tokens == 9 * tiny.LENGTH
    assert found.loss == pytest.approx(one.loss, rel=TOLERANCE[torch.float32])


@pytest.mark.parametrize("batch_size", [1, 2, 4, 50])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_number_of_ranks_does_not_matter(count: int, batch_size: int) -> None:
    assert_ranks_score_every_token_once(held_out_loss, count, batch_size)


@pytest.mark.parametrize(("count", "batch_size"), [(2, 4), (3, 2), (5, 50)])
def test_every_rank_makes_the_same_number_of_passes(count: int, batch_size: int) -> None:
    """A model in shares needs all ranks in each of them."""

    models = models_of(count)

    def work(ranks: Ranks) -> int:
        passes, model = [], models[ranks.rank]
        model.register_forward_pre_hook(lambda module, args: passes.append(args[0].shape))
        held_out_loss(
            model,
            evaluation_batches(tiny.held_out_split(150), tiny.LENGTH, batch_size),
            tiny.CPU,
            None,
            ranks,
        )
        return len(passes)

    batches = -(-9 // batch_size)
    assert all_returned(on_ranks(count, work)) == [-(-batches // count)] * count


def test_blocks_are_those_of_the_split_in_order() -> None:
    split, model = tiny.held_out_split(150), tiny.tiny_model()
    held = held_out_loss(model, evaluation_batches(split, tiny.LENGTH, 4), tiny.CPU)
    alone = [
        held_out_loss(model, [batch], tiny.CPU).loss
        for batch in evaluation_batches(split, tiny.LENGTH, 1)
    ]
    assert held.block_losses == pytest.approx(alone, rel=TOLERANCE[torch.float32])
    assert sum(held.block_losses) / len(alone) == pytest.approx(held.loss)


def test_units() -> None:
    held = HeldOutLoss(nats=30.0, tokens=10, num_bytes=40)
    assert held.loss == 3
    assert held.perplexity == math.exp(3)
    assert held.bits_per_byte == pytest.approx(30 / math.log(2) / 40)


def test_a_uniform_guess_costs_the_logarithm_of_the_vocabulary() -> None:
    held = held_out_loss(
        tiny.Recording(), evaluation_batches(tiny.held_out_split(99), tiny.LENGTH, 2), tiny.CPU
    )
    assert held.perplexity == pytest.approx(tiny.VOCAB, rel=TOLERANCE[torch.float32])


def test_nothing_is_trained_by_an_evaluation() -> None:
    model = tiny.tiny_model().train()
    before = tiny.weights_of(model)
    held_out_loss(
        model, evaluation_batches(tiny.held_out_split(99), tiny.LENGTH, 2), tiny.CPU, nullcontext()
    )
    tiny.assert_same_bytes(tiny.weights_of(model), before)
    assert all(p.grad is None for p in model.parameters())
    assert not model.training


@pytest.mark.parametrize("max_tokens", [None, 2 * tiny.LENGTH])
def test_the_benchmark_evaluates_on_the_validation_split(max_tokens: int | None) -> None:
    tiny.assert_evaluates_on_validation(max_tokens)


def test_the_benchmark_trains_on_the_train_split() -> None:
    batches = tiny.comparison().batches(seed=0)
    seen = {token for step in range(20) for token in batches.at(step).unique().tolist()}
    assert seen <= set(tiny.SPLITS["train"])


class FixedLogits(nn.Module):
    """The same logits whatever it reads; remembers what it was asked."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.calls = nn.Parameter(logits), []

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return SimpleNamespace(logits=self.logits)


def test_next_token_loss_has_one_term_for_each_token_but_the_first() -> None:
    logits = torch.randn(
        2, 5, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ).float()
    tokens = torch.tensor([[6, 1, 2, 3, 4, 5], [0, 0, 6, 6, 2, 1]])
    model = FixedLogits(logits)
    terms = next_token_loss(model, tokens, reduction="none")
    assert terms.shape == (2, 5)
    odds = logits.log_softmax(-1)
    for row in range(2):
        for t in range(5):
            assert terms[row, t].item() == pytest.approx(
                -odds[row, t, tokens[row, t + 1]].item(), rel=TOLERANCE[torch.float32]
            )
    assert next_token_loss(model, tokens).item() == pytest.approx(
        terms.mean().item(), rel=TOLERANCE[torch.float32]
    )
    other_start = torch.cat([(tokens[:, :1] + 1) % 7, tokens[:, 1:]], dim=1)
    assert torch.equal(next_token_loss(model, other_start, reduction="none"), terms)


def test_nothing_is_padded_or_masked() -> None:
    """Blocks are full: the model is shown T tokens a row and no mask, and every logit has a part in
    the loss."""
    tokens = torch.randint(7, (2, 6), generator=torch.Generator().manual_seed(0))
    model = FixedLogits(torch.zeros(2, 5, 7))
    next_token_loss(model, tokens).backward()
    (shown,), options = model.calls[0]
    assert torch.equal(shown, tokens[:, :-1])
    assert options == {"use_cache": False}  # nothing is padded or masked
    assert model.logits.grad is not None
    hits = torch.nn.functional.one_hot(tokens[:, 1:], 7)
    close(model.logits.grad, (1 / 7 - hits) / 10)


def test_half_precision_logits_are_scored_in_float32() -> None:
    model = FixedLogits(torch.zeros(1, 2, 7, dtype=torch.bfloat16))
    assert next_token_loss(model, torch.tensor([[1, 2, 3]])).dtype == torch.float32
