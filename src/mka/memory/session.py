"""L2, the session level: a causal summary of the row's whole past (arXiv 2603.20586, session memory)."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from mka.ops.precision import upcast
from mka.ops.scan import causal_average

SHORTEST, LONGEST = 4.0, 4096.0
"""Time constants, in tokens, of the first and the last channel of a learned decay at the start."""


class SessionAverage(nn.Module):
    """m_t, the exponential moving average of x_1..x_t, with one decay for all channels or a learned one for each.

    A learned decay a = sigmoid(decay_logit) starts with time constants -1/ln(a) spread geometrically over the channels.
    """

    def __init__(self, hidden_size: int, decay: float | Literal["learned"]) -> None:
        super().__init__()
        self.fixed_decay = None if decay == "learned" else decay
        if decay == "learned":
            time_constants = torch.logspace(math.log10(SHORTEST), math.log10(LONGEST), hidden_size)
            self.decay_logit = nn.Parameter(-torch.log(torch.expm1(1 / time_constants)))

    def decay(self, x: Tensor) -> Tensor:
        """a (C,), each in (0, 1), for inputs x (..., C)."""
        if self.fixed_decay is None:
            return torch.sigmoid(upcast(self.decay_logit))  # in bfloat16 the slow decays would round to 1
        return torch.full((x.shape[-1],), self.fixed_decay, dtype=upcast(x).dtype, device=x.device)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, C) -> m (B, T, C) in float32 or better."""
        return causal_average(x, self.decay(x))
