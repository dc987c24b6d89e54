"""L1, the local level: the tokens themselves, within the window, and the sinks; from this call, and from a state."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from mka.limits import InputError
from mka.memory.entry import Entry
from mka.memory.state import State
from mka.ops.attend import (
    MIN_BLOCK,
    Read,
    Window,
    attend_all,
    attend_at,
    attend_causal,
    attend_window,
    attention_weights,
    both,
)

Expand = Callable[[Tensor], tuple[Tensor, Tensor]]
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
    names: tuple[str, str], shape: tuple[int, ...], dtype: torch.dtype, window: Window | None
) -> dict[str, Entry]:
    """The stores that `attend_local` reads: the tokens of the window, and the sinks before them."""
    if window is None:
        return {name: Entry(shape, dtype) for name in names}
    return {name: Entry(shape, dtype, latest=window.reach, first=window.sinks) for name in names}


def attend_local(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window | None,
    state: State | None = None,
    names: tuple[str, str] = ("k", "v"),
    scale: float | None = None,
    expand: Expand | None = None,
    *,
    far: Callable[[], Tensor] | None = None,
    lse: bool = False,
) -> Read:
    """Causal attention over the window (None: all tokens), those of the state included.

    q (B, T, H, D), k and v (B, T, G, D), rotated; the state keeps k and v under `names` (twice the same: k is v).
    `expand` makes keys and values of what the state keeps, where that is something else; k is then what it keeps.
    `far` gives the queries (B, T, H, D) as tokens beyond `window.until` meet the sinks.
    Returns (B, T, H, D), and the log-sum-exps where `lse` asks for them. Raises ValueError where weights are shown that
    have no such place.
    """
    if far is not None and window is not None and is_beyond(q, window, state):
        read = attend_local(q, k, v, window, state, names, scale, expand, lse=True)
        held = [k[:, : window.sinks], v[:, : window.sinks]] if state is None else [state.first(name) for name in names]
        return both(read, read_sinks(far(), held, token_index(q, state), window, scale), lse=lse)
    if (shown := shown_here()) is not None:
        shown.append(weights_over_tokens(q, k, window, state, names[0], scale, expand))
    if state is None:
        return attend_causal(q, k, v, window, scale, lse=lse)
    new = dict(zip(names, (k, v), strict=True))
    if state.is_fresh:
        for name, x in new.items():
            state.write(name, x)
        return attend_causal(q, k, v, window, scale, lse=lse)

    def as_read(held: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return (held[names[0]], held[names[1]]) if expand is None else expand(held[names[0]].to(q.dtype))

    if window is not None and q.shape[1] > spare_places(state, names[0], window):
        before = min(window.reach - 1, max(state.past))
        run = {name: torch.cat([state.latest(name, before, after=False).to(x.dtype), x], 1) for name, x in new.items()}
        for name, x in new.items():
            state.write(name, x)
        sinks = {name: state.first(name).to(x.dtype) for name, x in new.items()}
        if state.is_even:
            return attend_window(q, *as_read(run), as_read(sinks), window, state.past[0], scale, lse=lse)
        keys, values = as_read({name: torch.cat([sinks[name], x], dim=1) for name, x in run.items()})
        key = numbers_of_run(token_index(q, state), before, window)
        own = window.sinks + before
        ordered = {"newest": lambda i: own + i, "kept": window.sinks}
        return attend_at(q, keys, values, token_index(q, state), key, window, **ordered, scale=scale, lse=lse)
    for name, x in new.items():
        state.write(name, x)
    keys, values = as_read({name: state.held(name) for name in new})
    one = state.is_even and state.lengths[0] - state.past[0] == 1
    if one and (window is None or state.lengths[0] <= window.size):
        return attend_all(q, keys, values, scale, lse=lse)
    newest = (lambda i: state.past[0] + i) if window is None and state.is_even else None
    key = state.entry_at(names[0])
    return attend_at(q, keys, values, token_index(q, state), key, window, newest=newest, scale=scale, lse=lse)


def is_beyond(x: Tensor, window: Window, state: State | None) -> bool:
    """Whether a token of this call reads its sinks at a distance of their own."""
    length = x.shape[1] if state is None else max(state.lengths)
    if window.until is None or not window.sinks or length <= window.until + 1:
        return False
    if shown_here() is not None:
        raise InputError(
            f"output_attentions is True; beyond max_distance {window.until} the sinks are read apart, and such weights "
            f"are not shown; this row has {length} tokens"
        )
    return True


def read_sinks(far: Tensor, held: Sequence[Tensor], t: Tensor, window: Window, scale: float | None) -> Read:
    """The sinks alone, by tokens beyond `window.until`; the others read nothing."""
    newest = torch.where(t > (window.until or 0), window.sinks - 1, -1)
    numbers = torch.arange(window.sinks, device=t.device)[None]
    return attend_at(far, held[0], held[1], newest, numbers, scale=scale, lse=True)


def numbers_of_run(t: Tensor, before: int, window: Window) -> Tensor:
    """(B or 1, sinks + before + T): the tokens in columns that are the sinks, `before` tokens, and those at t (B, T).

    Negative where there is none, and where a sink stands in the run: it is no second time there.
    """
    run = t[:, :1] - before + torch.arange(before + t.shape[1], device=t.device)
    sinks = torch.arange(window.sinks, device=t.device).expand(len(t), -1)
    return torch.cat([sinks, run.where(run >= window.sinks, -1)], dim=1)


def weights_over_tokens(
    q: Tensor,
    k: Tensor,
    window: Window | None,
    state: State | None,
    name: str,
    scale: float | None,
    expand: Expand | None = None,
) -> Tensor:
    """(B, H, T, N): what `attend_local` is about to weigh the N tokens of a row with; its k is not written yet."""
    t = token_index(q, state)
    if state is None or state.is_fresh:
        return attention_weights(q, k, t, t, window, scale)
    before = max(state.past) if window is None else min(window.reach - 1, max(state.past))
    keys = torch.cat([state.latest(name, before, after=False).to(k.dtype), k], dim=1)
    if window is None:
        key = t[:, :1] - before + torch.arange(keys.shape[1], device=k.device)
    else:
        key = numbers_of_run(t, before, window)
        written = state.first(name).to(k.dtype).expand(len(q), *[-1] * (k.dim() - 1)).clone()
        for row, past in enumerate(state.past):  # sinks among this call's tokens are not written yet
            fresh = k[row, : max(0, window.sinks - past)]
            written[row, past : past + len(fresh)] = fresh
        keys = torch.cat([written, keys], dim=1)
    if expand is not None:
        keys, _ = expand(keys)
    near = attention_weights(q, keys, t, key, window, scale)
    places = key.clamp(min=0)[:, None, None].expand_as(near)
    tokens = max(max(state.lengths), int(key.max()) + 1)
    far = near.new_zeros(*near.shape[:3], tokens)
    return far.scatter_add(3, places, near)[..., : max(state.lengths)]


def spare_places(state: State, name: str, window: Window) -> int:
    """Tokens that can be written before they are read without losing one that their windows reach.

    A store that grows loses none; many tokens at once are read in blocks all the same.
    """
    limit = state.limit(name)
    return MIN_BLOCK if limit is None else limit - window.reach + 1
