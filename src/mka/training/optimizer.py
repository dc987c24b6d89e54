"""AdamW, warm-up and cosine decay: one recipe for every mechanism."""

import math

from torch import nn
from torch.optim import AdamW

BETAS = (0.9, 0.95)
WEIGHT_DECAY = 0.1
MAX_GRAD_NORM = 1.0
WARMUP_FRACTION = 0.1
FINAL_FRACTION = 0.1


def build_optimizer(model: nn.Module, learning_rate: float) -> AdamW:
    """Weight decay on matrices only: biases, norms, decays and gates have none."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=learning_rate, betas=BETAS, fused=True)


def learning_rate_at(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over a tenth of the steps, then a cosine down to a tenth of the peak. `step` counts from 0."""
    warmup = max(1, round(WARMUP_FRACTION * steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (FINAL_FRACTION + (1 - FINAL_FRACTION) * (1 + math.cos(math.pi * progress)) / 2)
