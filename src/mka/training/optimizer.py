"""AdamW, warm-up and cosine decay: one recipe for every mechanism."""

import math
from collections.abc import Callable
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from mka.memory.router import Router

RateOf = Callable[[str], float]
"""How many times the learning rate a parameter has, by its name."""

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
MAX_GRAD_NORM = 1.0
WARMUP_FRACTION = 0.1
FINAL_FRACTION = 0.1


def build_optimizer(model: nn.Module, learning_rate: float, rate_of: RateOf = lambda name: 1.0) -> AdamW:
    """Of the parameters that are trained. Weight decay on matrices only: biases, norms, decays, gates and routers have
    none."""
    routers = {id(p) for module in model.modules() if isinstance(module, Router) for p in module.parameters()}
    groups: dict[tuple[float, float], dict[str, Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = WEIGHT_DECAY if parameter.dim() >= 2 and id(parameter) not in routers else 0.0
            rate = rate_of(name)
            group = groups.setdefault((decay, rate), {"params": [], "weight_decay": decay, "rate": rate})
            group["params"].append(parameter)
    return AdamW(groups.values(), lr=learning_rate, betas=BETAS, fused=True)


def set_learning_rate(optimizer: Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group["rate"]


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine down to a tenth of the peak. `step` counts from 0."""
    warmup = max(1, round(WARMUP_FRACTION * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (FINAL_FRACTION + (1 - FINAL_FRACTION) * (1 + math.cos(math.pi * progress)) / 2)
