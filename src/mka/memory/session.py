"""L2, the session level: a causal summary of the row's whole past (session memory in
arXiv 2603.20586)."""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from mka.memory.entry import Entry
from mka.memory.local import token_index
from mka.memory.state import State
from mka.ops.attend import Read, Window, attend_at, attend_causal
from mka.ops.precision import upcast, wide
from mka.ops.scan import carry_average, causal_average

SHORTEST, LONGEST = 4.0, 4096.0
"""Initial time constants of a learned decay, in tokens, for the first and the last
channel."""


class SessionAverage(nn.Module):
    """m_t, the exponential moving average of x_1..x_t, divided by the sum of its
    weights.

    Args:
        hidden_size: C, the number of channels.
        decay: a in (0, 1), one for all channels, or "learned": one per channel, a =
            sigmoid(decay_logit), whose time constants -1 / ln(a) start spread
            geometrically from SHORTEST to LONGEST tokens.
    """

    def __init__(self, hidden_size: int, decay: float | Literal["learned"]) -> None:
        super().__init__()
        self.fixed_decay = None if decay == "learned" else decay
        if decay == "learned":
            # The logit of exp(-1 / tau), in a form that stays accurate for a near 1.
            time_constants = torch.logspace(math.log10(SHORTEST), math.log10(LONGEST), hidden_size)
            self.decay_logit = nn.Parameter(-torch.log(torch.expm1(1 / time_constants)))

    def decay(self, x: Tensor) -> Tensor:
        """a (C,), each in (0, 1), for inputs x (..., C)."""
        if self.fixed_decay is None:
            # In bfloat16 the slow decays would round to 1.
            a = torch.sigmoid(upcast(self.decay_logit))
        else:
            a = torch.full((x.shape[-1],), self.fixed_decay, dtype=upcast(x).dtype, device=x.device)
        # log(a) has to be finite and below 0: a state's average is carried on by its
        # powers.
        kind = torch.finfo(a.dtype)
        return a.clamp(kind.tiny, 1 - kind.eps / 2)

    def entries(self, hidden_size: int, dtype: torch.dtype) -> dict[str, Entry]:
        """The store of m. The number of tokens that it averages is the row's length,
        kept there."""
        return {"m": Entry((hidden_size,), wide(dtype), latest=1)}

    def forward(self, x: Tensor, state: State | None = None) -> Tensor:
        """x (B, T, C) -> m (B, T, C) in float32 or better; continues from the state,
        and adds to it."""
        # The new tokens alone, then joined with the mean before them: the scan has no
        # start value.
        m = causal_average(x, self.decay(x))
        if state is None:
            return m
        if not state.is_fresh:
            before = state.latest("m", 1, after=False).squeeze(1)
            m = carry_average(m, before, state.starts(x.device), self.decay(x))
        state.write("m", m)
        return m


def slot_columns(stride: int, tokens: int, state: State) -> Tensor:
    """(B or 1, N): columns of this call's `tokens` that complete a session slot.

    N is the largest count over rows; rows with fewer are padded with arbitrary columns.
    """
    past = state.starts(state.device)[:, None]
    first = (stride - 1 - past) % stride
    count = max(
        after // stride - before // stride
        for after, before in zip(state.lengths, state.past, strict=True)
    )
    return (first + stride * torch.arange(count, device=past.device)).clamp(max=tokens - 1)


def attend_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stride: int,
    window: int | None,
    state: State | None,
    names: tuple[str, str],
    *,
    lse: bool = False,
) -> Read:
    """Attention to the latest completed session slots, slots of the state included.

    Args:
        q: (B, T, H, D).
        k, v: (B, N, G, D), the slots that this call completes; a row with fewer has them in its
            first columns.
        stride: tokens per slot.
        window: how many of the latest slots a token reads (None: all).
        state: to read from and to write the slots to (None: this call is the whole row).
        names: the state's stores of k and v.
        lse: also return the log-sum-exps. Default: False.

    Returns a read of (B, T, H, D), of zeros before a row's first slot.
    """
    t, latest = token_index(q, state), None if window is None else Window(window)
    if state is None:
        if stride == 1:
            return attend_causal(q, k, v, latest, lse=lse)
        slot, first = torch.arange(k.shape[1], device=q.device)[None], 0
    else:
        k, v, slot, first = slots_of_state(k, v, stride, window, state, names)
    # Slots are attended to as tokens with indices of their own: t has seen (t + 1) //
    # stride slots.
    past = 0 if state is None else state.past[0]
    newest = None if first is None else lambda i: (past + i + 1) // stride - 1 - first
    return attend_at(q, k, v, (t + 1) // stride - 1, slot, latest, newest=newest, lse=lse)


def slots_of_state(
    k: Tensor, v: Tensor, stride: int, window: int | None, state: State, names: tuple[str, str]
) -> tuple[Tensor, Tensor, Tensor, int | None]:
    """Keys and values of the slots that this call reads, after writing its own, and
    their numbers (B or 1, N).

    The last result is the number of the first slot, if all rows have equally many slots
    and they are in order; otherwise None.
    """
    # Each slot that is completed after the call's first token takes the place of an
    # older one.
    new, limit = dict(zip(names, (k, v), strict=True)), state.limit(names[0])
    lost = max(
        n // stride - (past + 1) // stride
        for past, n in zip(state.past, state.lengths, strict=True)
    )
    before, earlier = {}, 0
    # If they outnumber the ring's spare places, the first token still reads slots that
    # they would overwrite: those are copied first.
    if window is not None and limit is not None and lost > limit - window:
        earlier = min(window, max(state.past) // stride)
        before = {name: state.latest(name, earlier, after=False) for name in names}
    for name, x in new.items():
        state.write(name, x)
    if before:
        keys, values = (
            torch.cat([before[name], x.to(before[name].dtype)], dim=1) for name, x in new.items()
        )
        start = (state.starts(k.device) // stride)[:, None] - earlier
        first = state.past[0] // stride - earlier if state.is_even else None
        return keys, values, start + torch.arange(keys.shape[1], device=k.device), first
    keys, values = (state.held(name) for name in names)
    return keys, values, state.entry_at(names[0]), 0 if window is None and state.is_even else None
