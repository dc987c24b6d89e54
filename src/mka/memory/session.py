"""L2, the session level: a causal summary of the row's whole past (arXiv 2603.20586, session memory)."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from mka.memory.state import Entry, State
from mka.ops.precision import upcast, wide
from mka.ops.scan import carry_average, causal_average

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

    def entries(self, hidden_size: int, dtype: torch.dtype) -> dict[str, Entry]:
        """m; the number of tokens it was taken over is that of the row."""
        return {"m": Entry((hidden_size,), wide(dtype), latest=1)}

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        """x (B, T, C) -> m (B, T, C) in float32 or better."""
        m = causal_average(x, self.decay(x))
        if state is None:
            return m
        if not state.is_fresh:
            before = state.latest("m", 1, after=False).squeeze(1)
            m = carry_average(m, before, state.starts(x.device), self.decay(x))
        state.write("m", m)
        return m


def slot_columns(stride: int, tokens: int, state: State) -> Tensor:
    """(B or 1, N): where, among the `tokens` of this call, those stand that complete a session slot.

    N is that of the row with most of them; what a row has less is any column.
    """
    past = state.starts(state.device)[:, None]
    first = (stride - 1 - past) % stride
    count = max(after // stride - before // stride for after, before in zip(state.lengths, state.past, strict=True))
    return (first + stride * torch.arange(count, device=past.device)).clamp(max=tokens - 1)
