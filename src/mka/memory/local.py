"""L1, the local level: the tokens themselves, within the window; from this call, and from a state before it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from mka.memory.entry import Entry
from mka.memory.state import State
from mka.ops.attend import MIN_BLOCK, attend_all, attend_at, attend_causal, attention_weights

SHOWN: ContextVar[list[Tensor] | None] = ContextVar("shown", default=None)
"""Where `attend_local` leaves its weights; None: nobody asked."""


@contextmanager
def shown_weights() -> Iterator[list[Tensor]]:
    """Inside, every call of `attend_local` adds its weights (B, H, T, N) over the N tokens of a row, first token first.

    A row of fewer tokens has zeros after its last one. They are computed besides: the kernels keep none.
    """
    weights: list[Tensor] = []
    token = SHOWN.set(weights)
    try:
        yield weights
    finally:
        SHOWN.reset(token)


def shown_here() -> list[Tensor] | None:
    """The list of the `shown_weights` around this call; None without one, and while torch compiles."""
    return None if torch.compiler.is_compiling() else SHOWN.get()


def token_index(x: Tensor, state: State | None) -> Tensor:
    """(B or 1, T): the index of each token of x (B, T, ...) among its row's valid tokens, counted from 0."""
    t = torch.arange(x.shape[1], device=x.device)[None]
    return t if state is None else state.starts(x.device)[:, None] + t


def local_entries(
    names: tuple[str, str], shape: tuple[int, ...], dtype: torch.dtype, window: int | None
) -> dict[str, Entry]:
    """The stores that `attend_local` reads."""
    return {name: Entry(shape, dtype, latest=window) for name in names}


def attend_local(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    state: State | None = None,
    names: tuple[str, str] = ("k", "v"),
    scale: float | None = None,
    expand: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """Causal attention over the latest `window` tokens (None: all), those of the state included.

    q (B, T, H, D), k and v (B, T, G, D), rotated; the state keeps k and v under `names` (twice the same: k is v).
    `expand` makes keys and values of what the state keeps, where that is something else; k is then what it keeps.
    Returns (B, T, H, D).
    """
    if (shown := shown_here()) is not None:
        shown.append(weights_over_tokens(q, k, window, state, names[0], scale, expand))
    if state is None:
        return attend_causal(q, k, v, window, scale)
    new = dict(zip(names, (k, v), strict=True))
    if state.is_fresh:
        for name, x in new.items():
            state.write(name, x)
        return attend_causal(q, k, v, window, scale)
    before = 0 if window is None else min(window - 1, max(state.past))
    if window is not None and q.shape[1] > spare_places(state, names[0], window):
        held = {name: torch.cat([state.latest(name, before, after=False).to(x.dtype), x], 1) for name, x in new.items()}
        key = token_index(q, state)[:, :1] - before + torch.arange(before + q.shape[1], device=q.device)
        column: int | None = before
        for name, x in new.items():
            state.write(name, x)
    else:
        for name, x in new.items():
            state.write(name, x)
        held, key, column = in_place(state, names, window, before + q.shape[1])
    keys, values = (held[name] for name in names) if expand is None else expand(held[names[0]].to(q.dtype))
    if key is None:
        return attend_all(q, keys, values, scale)
    newest = None if column is None else lambda i: column + i
    return attend_at(q, keys, values, token_index(q, state), key, window, newest=newest, scale=scale)


def weights_over_tokens(
    q: Tensor,
    k: Tensor,
    window: int | None,
    state: State | None,
    name: str,
    scale: float | None,
    expand: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
) -> Tensor:
    """(B, H, T, N): what `attend_local` is about to weigh the N tokens of a row with; its k is not written yet."""
    t = token_index(q, state)
    if state is None or state.is_fresh:
        return attention_weights(q, k, t, t, window, scale)
    before = max(state.past) if window is None else min(window - 1, max(state.past))
    keys = torch.cat([state.latest(name, before, after=False).to(k.dtype), k], dim=1)
    key = t[:, :1] - before + torch.arange(keys.shape[1], device=k.device)
    if expand is not None:
        keys, _ = expand(keys)
    near = attention_weights(q, keys, t, key, window, scale)
    places = key.clamp(min=0)[:, None, None].expand_as(near)
    tokens = max(max(state.lengths), int(key.max()) + 1)
    far = near.new_zeros(*near.shape[:3], tokens)
    return far.scatter_add(3, places, near)[..., : max(state.lengths)]


def spare_places(state: State, name: str, window: int) -> int:
    """Tokens that can be written before they are read without losing one that their windows reach.

    A store that grows loses none; many tokens at once are read in blocks all the same.
    """
    limit = state.limit(name)
    return MIN_BLOCK if limit is None else limit - window + 1


def in_place(
    state: State, names: tuple[str, str], window: int | None, reach: int
) -> tuple[dict[str, Tensor], Tensor | None, int | None]:
    """Keys and values without copying them where all rows are even: by name, their token indices, and the
    column of the call's first token where they stand in order.

    No indices: the one token of this call sees all of them.
    """
    one = state.is_even and state.lengths[0] - state.past[0] == 1
    if window is None or state.limit(names[0]) is not None:
        held = {name: state.held(name) for name in names}
        if one and (window is None or held[names[0]].shape[1] <= window):
            return held, None, None
        return held, state.entry_at(names[0]), state.past[0] if window is None and state.is_even else None
    # `reach` counts the columns of the call, padding among them: one token's window may be shorter.
    reach = min(reach, max(state.lengths), window if one else reach)
    held = {name: state.latest(name, reach, after=True) for name in names}
    if one:
        return held, None, None
    newest = torch.tensor(state.lengths[:1] if state.is_even else state.lengths, device=state.device)[:, None]
    return held, newest - reach + torch.arange(reach, device=state.device), None
