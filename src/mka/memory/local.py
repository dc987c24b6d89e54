"""L1, the local level: the tokens themselves, within the window; from this call, and from a state before it."""

import torch
from torch import Tensor

from mka.memory.state import Entry, State
from mka.ops.attend import MIN_BLOCK, attend_all, attend_at, attend_causal


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
) -> Tensor:
    """Causal attention over the latest `window` tokens (None: all), those of the state included.

    q (B, T, H, D), k and v (B, T, G, D), rotated; the state keeps k and v under `names` (twice the same: k is v).
    Returns (B, T, H, D).
    """
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
        lead: int | None = before
        for name, x in new.items():
            state.write(name, x)
    else:
        for name, x in new.items():
            state.write(name, x)
        held, key, lead = in_place(state, names, window, before + q.shape[1])
    keys, values = (held[name] for name in names)
    if key is None:
        return attend_all(q, keys, values, scale)
    return attend_at(q, keys, values, token_index(q, state), key, window, lead=lead, scale=scale)


def spare_places(state: State, name: str, window: int) -> int:
    """Tokens that can be written before they are read without losing one that their windows reach.

    A store that grows loses none; many tokens at once are read in blocks all the same.
    """
    limit = state.limit(name)
    return MIN_BLOCK if limit is None else limit - window + 1


def in_place(
    state: State, names: tuple[str, str], window: int | None, reach: int
) -> tuple[dict[str, Tensor], Tensor | None, int | None]:
    """Keys and values without copying them where all rows are even: by name, their token indices, `lead`.

    No indices: the one token of this call sees all of them.
    """
    one = state.is_even and state.lengths[0] - state.past[0] == 1
    if window is None or state.limit(names[0]) is not None:
        held = {name: state.held(name) for name in names}
        if one and (window is None or held[names[0]].shape[1] <= window):
            return held, None, None
        return held, state.entry_at(names[0]), state.past[0] if window is None and state.is_even else None
    reach = min(reach, max(state.lengths))
    held = {name: state.latest(name, reach, after=True) for name in names}
    if one:
        return held, None, None
    newest = torch.tensor(state.lengths[:1] if state.is_even else state.lengths, device=state.device)[:, None]
    return held, newest - reach + torch.arange(reach, device=state.device), None
