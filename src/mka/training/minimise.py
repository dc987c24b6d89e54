"""A minimal training: one process, no checkpoints. Comparisons use `loop` instead."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mka.training.nonfinite import NonFiniteLoss
from mka.training.optimizer import (
    MAX_GRAD_NORM,
    build_optimizer,
    learning_rate_at,
    set_learning_rate,
)


def minimise(
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
