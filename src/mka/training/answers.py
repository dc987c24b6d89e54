"""Training on answers alone: the tokens that are due in a batch of recall, and no others."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mka.data.recall import NOT_ASKED, RecallBatch
from mka.training.minimise import minimise

LOOK_EVERY = 100


def answer_logits(model: Any, batch: RecallBatch) -> tuple[Tensor, Tensor]:
    """Logits (N, V) and tokens (N,) of the N answers that are due; the head sees nothing else."""
    hidden = model.base_model(batch.tokens.to(model.device), use_cache=False).last_hidden_state
    due = (batch.targets != NOT_ASKED).to(model.device)
    return model.lm_head(hidden[due]), batch.targets.to(model.device)[due]


def train_on_answers(
    model: Any, batch_at: Callable[[int], RecallBatch], steps: int, learning_rate: float, look: Callable[[], str]
) -> None:
    """`minimise` over `batch_at(0)`, `batch_at(1)`, ...; every 100 steps a line with what `look` says."""
    begun = time.perf_counter()

    def after(step: int, loss: float) -> None:
        if (step + 1) % LOOK_EVERY == 0 or step + 1 == steps:
            seconds = time.perf_counter() - begun
            print(f"step {step + 1}/{steps}, {seconds:.0f} s, loss {loss:.3f}; {look()}", flush=True)

    minimise(model, lambda step: cross_entropy(*answer_logits(model, batch_at(step))), steps, learning_rate, after)


@torch.no_grad()
def answers_right(model: Any, batch: RecallBatch) -> float:
    """The share of the answers' tokens that are the likeliest ones."""
    logits, due = answer_logits(model.eval(), batch)
    return (logits.argmax(-1) == due).float().mean().item()
