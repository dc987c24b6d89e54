"""AdamW with warm-up and cosine decay: the same recipe for all mechanisms."""

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from mka.memory.router import Router

RateOf = Callable[[str], float]
"""The factor of a parameter's learning rate, by the parameter's name."""

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
MAX_GRAD_NORM = 1.0
WARMUP_FRACTION = 0.1
FINAL_FRACTION = 0.1


def build_optimizer(
    model: nn.Module, learning_rate: float, rate_of: RateOf = lambda name: 1.0
) -> AdamW:
    """AdamW over the parameters that are trained, with weight decay on matrices only.

    Biases, norms, decays, gates and routers have no weight decay. rate_of: factor of
    the learning rate, by parameter name.
    """
    # Routers by identity: their weights are matrices, which decay would pull to an even
    # mix.
    routers = {
        id(p)
        for module in model.modules()
        if isinstance(module, Router)
        for p in module.parameters()
    }
    # One group for each pair of decay and rate: AdamW updates a group in one fused
    # call.
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = WEIGHT_DECAY if parameter.dim() >= 2 and id(parameter) not in routers else 0.0
            rate = rate_of(name)
            group = groups.setdefault(
                (decay, rate), {"params": [], "weight_decay": decay, "rate": rate}
            )
            group["params"].append(parameter)
    return AdamW(groups.values(), lr=learning_rate, betas=BETAS, fused=True)


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every group to `learning_rate` times the group's own
    factor."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["rate"]


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """The learning rate of a step, counted from 0.

    It rises linearly over the first tenth of the steps, then falls on a cosine to a
    tenth of `peak`.
    """
    warmup = max(1, round(WARMUP_FRACTION * steps))
    if step < warmup:
        # step + 1, so that the first step has a rate above 0 and trains.
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (FINAL_FRACTION + (1 - FINAL_FRACTION) * (1 + math.cos(math.pi * progress)) / 2)
