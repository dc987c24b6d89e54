"""The smallest training there is: one process, no checkpoints. `loop` is the one that a comparison uses."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from mka.training.nonfinite import NonFiniteLoss
from mka.training.optimizer import MAX_GRAD_NORM, build_optimizer, learning_rate_at, set_learning_rate


def minimise(
    model: nn.Module,
    loss_at: Callable[[int], Tensor],
    steps: int,
    learning_rate: float,
    after: Callable[[int, float], None] = lambda _step, _loss: None,
) -> None:
    """AdamW on `loss_at(0)`, `loss_at(1)`, ... with the loop's schedule and clipping; `after` gets step and loss.

    Raises NonFiniteLoss before the step that a loss which is not finite would have spoilt.
    """
    optimizer = build_optimizer(model, learning_rate)
    for step in range(steps):
        set_learning_rate(optimizer, learning_rate_at(step, steps, learning_rate))
        model.train()
        loss = loss_at(step)
        if not torch.isfinite(loss):
            raise NonFiniteLoss(f"the loss is {loss.item()} at step {step}; use a smaller learning rate")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
        optimizer.step()
        after(step, loss.item())
