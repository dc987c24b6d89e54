"""Training on answers: the tokens to be recalled in a batch, alone or with the text
around them."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mka.data.recall import NOT_ASKED, RecallBatch
from mka.training.minimise import minimise

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
    Raises NonFiniteLoss as `minimise` does.
    """
    begun = time.perf_counter()

    def after(step: int, loss: float) -> None:
        """Print a line after every 100th step and after the last one."""
        if (step + 1) % LOOK_EVERY == 0 or step + 1 == steps:
            seconds = time.perf_counter() - begun
            print(
                f"step {step + 1}/{steps}, {seconds:.0f} s, loss {loss:.3f}; {look()}", flush=True
            )

    minimise(model, lambda step: loss_of(model, batch_at(step)), steps, learning_rate, after)


@torch.no_grad()
def answers_right(model: Any, batch: RecallBatch) -> float:
    """The share of the answers' tokens that the model predicts, from 0 to 1."""
    # This leaves the model in evaluation mode; `minimise` returns it to training before
    # each step.
    logits, due = answer_logits(model.eval(), batch)
    return (logits.argmax(-1) == due).float().mean().item()
