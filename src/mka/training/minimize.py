"""A minimal training: one process, no checkpoints; and training on answers, the tokens to
be recalled in a batch. Comparisons use `loop` instead."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from mka.data.recall import NOT_ASKED, RecallBatch
from mka.training.nonfinite import NonFiniteLoss
from mka.training.optimizer import (
    MAX_GRAD_NORM,
    build_optimizer,
    learning_rate_at,
    set_learning_rate,
)


def minimize(
    model: nn.Module,
    loss_at: Callable[[int], Tensor],
    steps: int,
    learning_rate: float,
    after: Callable[[int, float], None] = lambda _step, _loss: None,
) -> None:
    """Train with AdamW on `loss_at(0)`, `loss_at(1)`, ... with the loop's schedule and
    clipping.

    loss_at: the loss of a step, a scalar. after: called after each step with its number
    and loss. Raises NonFiniteLoss before a loss that is not finite reaches the weights.
    """
    optimizer = build_optimizer(model, learning_rate)
    for step in range(steps):
        set_learning_rate(optimizer, learning_rate_at(step, steps, learning_rate))
        # In every step, because `after` may have evaluated the model.
        model.train()
        loss = loss_at(step)
        # Before the backward pass: AdamW would carry a NaN into every weight for good.
        if not torch.isfinite(loss):
            raise NonFiniteLoss(
                f"the loss is {loss.item()} at step {step}; use a smaller learning rate"
            )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        after(step, loss.item())


LOOK_EVERY = 100
"""Steps between two lines of progress."""


def answer_logits(model: Any, batch: RecallBatch) -> tuple[Tensor, Tensor]:
    """Logits (N, V) and true tokens (N,) of the N answer tokens in a batch."""
    # Most tokens are not answers, so the large product with the vocabulary is made for
    # these alone.
    hidden = model.base_model(batch.tokens.to(model.device), use_cache=False).last_hidden_state
    due = (batch.targets != NOT_ASKED).to(model.device)
    return model.lm_head(hidden[due]), batch.targets.to(model.device)[due]


def answers_loss(model: Any, batch: RecallBatch) -> Tensor:
    """The mean loss over the answers' tokens, in nats per token: a scalar."""
    return cross_entropy(*answer_logits(model, batch))


def answers_and_text_loss(model: Any, batch: RecallBatch) -> Tensor:
    """The mean loss over the answers' tokens plus that over all tokens, both in nats
    per token."""
    # The answers of a few rows are a weak signal: a model can do fairly well by naming
    # the key's digits in any order. Text teaches it to continue from where the same
    # tokens were before, which is what an answer needs.
    tokens, targets = batch.tokens.to(model.device), batch.targets.to(model.device)
    logits = model(tokens, use_cache=False).logits
    answers = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NOT_ASKED)
    return answers + cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def train_on_answers(
    model: Any,
    batch_at: Callable[[int], RecallBatch],
    steps: int,
    learning_rate: float,
    look: Callable[[], str],
    loss_of: Callable[[Any, RecallBatch], Tensor] = answers_loss,
) -> None:
    """Train a model on `batch_at(0)`, `batch_at(1)`, ... and print a line every 100
    steps.

    look: returns what the line ends with, such as the accuracy on held-out batches.
    Raises NonFiniteLoss as `minimize` does.
    """
    begun = time.perf_counter()

    def after(step: int, loss: float) -> None:
        """Print a line after every 100th step and after the last one."""
        if (step + 1) % LOOK_EVERY == 0 or step + 1 == steps:
            seconds = time.perf_counter() - begun
            print(
                f"step {step + 1}/{steps}, {seconds:.0f} s, loss {loss:.3f}; {look()}", flush=True
            )

    minimize(model, lambda step: loss_of(model, batch_at(step)), steps, learning_rate, after)


@torch.no_grad()
def answers_right(model: Any, batch: RecallBatch) -> float:
    """The share of the answers' tokens that the model predicts, from 0 to 1."""
    # This leaves the model in evaluation mode; `minimize` returns it to training before
    # each step.
    logits, due = answer_logits(model.eval(), batch)
    return (logits.argmax(-1) == due).float().mean().item()
