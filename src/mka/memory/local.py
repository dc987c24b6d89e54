"""L1, the local level: the tokens in the window and the sinks, from this call and from
a state."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from mka.errors import InputError
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
"""Makes keys and values (B, S, G, D) of what a state keeps (MLA: of latents)."""
SHOWN: ContextVar[list[Tensor] | None] = ContextVar("shown", default=None)
"""The list that `attend_local` adds its weights to; None: they are not asked for."""


@contextmanager
def shown_weights() -> Iterator[list[Tensor]]:
    """Inside, every call of `attend_local` adds its weights (B, H, T, N) over the N
    tokens of a row, first token first.

    A row of fewer tokens has zeros after its last one. The weights are computed
    separately, in addition to the attention itself, since the fused kernels do not
    return them.
    """
    weights: list[Tensor] = []
    token = SHOWN.set(weights)
    try:
        yield weights
    finally:
        SHOWN.reset(token)


def shown_here() -> list[Tensor] | None:
    """The list of the `shown_weights` around this call; None if there is none, and
    during torch.compile."""
    return None if torch.compiler.is_compiling() else SHOWN.get()


def token_index(x: Tensor, state: State | None) -> Tensor:
    """(B or 1, T): the index of each token of x (B, T, ...) among its row's valid
    tokens, counted from 0."""
    t = torch.arange(x.shape[1], device=x.device)[None]
    return t if state is None else state.starts(x.device)[:, None] + t


def local_entries(
    names: tuple[str, str], shape: tuple[int, ...], dtype: torch.dtype, window: Window | None
) -> dict[str, Entry]:
    """The two stores that `attend_local` reads, each entry of `shape`: all tokens, or
    those of the window and the sinks before them."""
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
    """Causal attention over the window, tokens of the state included.

    Args:
        q: (B, T, H, D), rotated.
        k, v: (B, T, G, D), rotated; with `expand`, what the state keeps.
        window: what a token sees. Default: None, all tokens up to itself.
        state: to read from and to write k and v to. Default: None, this call is the
            whole row.
        names: the state's stores of k and v; the same name twice if k is v. Default:
            "k", "v".
        scale: factor of the scores. Default: None, 1 / sqrt(D).
        expand: makes keys and values of what the state keeps. Default: None, it keeps
            them.
        far: gives the queries (B, T, H, D) that tokens beyond `window.until` read the
            sinks with. Default: None, the sinks are read like the window.
        lse: also return the log-sum-exps. Default: False.

    Returns a read of (B, T, H, D). Raises ValueError if weights are asked for
    (`shown_weights`) and a token lies beyond `window.until`: its sinks are read
    separately.
    """
    # The window first: it writes to the state, so the sinks are there when they are
    # read.
    if far is not None and window is not None and is_beyond(q, window, state):
        read = attend_local(q, k, v, window, state, names, scale, expand, lse=True)
        held = (
            [k[:, : window.sinks], v[:, : window.sinks]]
            if state is None
            else [state.first(name) for name in names]
        )
        return both(read, read_sinks(far(), held, token_index(q, state), window, scale), lse=lse)
    if (shown := shown_here()) is not None:
        shown.append(weights_over_tokens(q, k, window, state, names[0], scale, expand))
    if state is None:
        return attend_causal(q, k, v, window, scale, lse=lse)
    new = dict(zip(names, (k, v), strict=True))
    # Nothing came before: this call's own tensors are read, in order, and not the
    # store.
    if state.is_fresh:
        for name, x in new.items():
            state.write(name, x)
        return attend_causal(q, k, v, window, scale, lse=lse)

    def as_read(held: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values of what the state keeps."""
        return (
            (held[names[0]], held[names[1]])
            if expand is None
            else expand(held[names[0]].to(q.dtype))
        )

    # More tokens than the ring has spare places: writing them would overwrite keys that
    # the first of them still see. So the old keys are copied out before, and read
    # together with the new ones.
    if window is not None and q.shape[1] > spare_places(state, names[0], window):
        return attend_run(q, new, window, state, as_read, scale, lse=lse)
    # Few tokens: the store is read as it lies, as a ring out of order, and the index of
    # each place says who sees it. Sorting it would copy the window for every token.
    for name, x in new.items():
        state.write(name, x)
    keys, values = as_read({name: state.held(name) for name in new})
    # One token that sees everything held needs no mask, and its heads can share the
    # keys.
    one = state.is_even and state.lengths[0] - state.past[0] == 1
    if one and (window is None or state.lengths[0] <= window.size):
        return attend_all(q, keys, values, scale, lse=lse)
    newest = (lambda i: state.past[0] + i) if window is None and state.is_even else None
    key = state.entry_at(names[0])
    return attend_at(
        q, keys, values, token_index(q, state), key, window, newest=newest, scale=scale, lse=lse
    )


def attend_run(
    q: Tensor,
    new: dict[str, Tensor],
    window: Window,
    state: State,
    as_read: Callable[[dict[str, Tensor]], tuple[Tensor, Tensor]],
    scale: float | None,
    *,
    lse: bool,
) -> Read:
    """The window over a run of many tokens: the latest that the state holds, then the
    new ones.

    Args:
        q: (B, T, H, D), rotated.
        new: what the state is to keep of these tokens, by store, each (B, T, ...).
        as_read: makes keys and values of what the stores keep.
    """
    before = min(window.reach - 1, max(state.past))
    run = {}
    for store, x in new.items():
        run[store] = torch.cat([state.latest(store, before, after=False).to(x.dtype), x], 1)
    for store, x in new.items():
        state.write(store, x)
    sinks = {store: state.first(store).to(x.dtype) for store, x in new.items()}
    if state.is_even:
        first = state.past[0]
        return attend_window(q, *as_read(run), as_read(sinks), window, first, scale, lse=lse)
    # Rows of different lengths share no mask; the keys are in order, though, so tiles
    # of queries can leave out what none of them sees.
    joined = {store: torch.cat([sinks[store], x], dim=1) for store, x in run.items()}
    keys, values = as_read(joined)
    t = token_index(q, state)
    key = numbers_of_run(t, before, window)
    own = window.sinks + before
    ordered = {"newest": lambda i: own + i, "kept": window.sinks}
    return attend_at(q, keys, values, t, key, window, **ordered, scale=scale, lse=lse)


def is_beyond(x: Tensor, window: Window, state: State | None) -> bool:
    """Whether a token of this call reads its sinks separately, being beyond
    `window.until`.

    Raises ValueError if weights are asked for then.
    """
    length = x.shape[1] if state is None else max(state.lengths)
    if window.until is None or not window.sinks or length <= window.until + 1:
        return False
    if shown_here() is not None:
        raise InputError(
            f"output_attentions is True; beyond max_distance {window.until} the sinks are read "
            f"separately, and those weights are not shown; this row has {length} tokens"
        )
    return True


def read_sinks(
    far: Tensor, held: Sequence[Tensor], t: Tensor, window: Window, scale: float | None
) -> Read:
    """The sinks `held` (k and v) as tokens at t (B or 1, T) beyond `window.until` read
    them, with queries `far` (B, T, H, D); the other tokens read nothing."""
    # As a query at the last sink, a token sees all sinks; at -1 it sees no key.
    newest = torch.where(t > (window.until or 0), window.sinks - 1, -1)
    numbers = torch.arange(window.sinks, device=t.device)[None]
    return attend_at(far, held[0], held[1], newest, numbers, scale=scale, lse=True)


def numbers_of_run(t: Tensor, before: int, window: Window) -> Tensor:
    """(B or 1, sinks + before + T): token indices of columns that hold the sinks, then
    `before` tokens, then those at t (B or 1, T).

    Negative where there is no token, and at a sink among the latter two: it counts
    once.
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
    """(B, H, T, N): the weights with which `attend_local` is about to read the N tokens
    of a row.

    It is called before k is written to the state.
    """
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
        # Sinks among this call's own tokens are not in the state yet.
        for row, past in enumerate(state.past):
            fresh = k[row, : max(0, window.sinks - past)]
            written[row, past : past + len(fresh)] = fresh
        keys = torch.cat([written, keys], dim=1)
    if expand is not None:
        keys, _ = expand(keys)
    # From columns as they lie to columns by token index; empty columns weigh 0, so that
    # adding them to token 0 changes nothing.
    near = attention_weights(q, keys, t, key, window, scale)
    places = key.clamp(min=0)[:, None, None].expand_as(near)
    tokens = max(max(state.lengths), int(key.max()) + 1)
    far = near.new_zeros(*near.shape[:3], tokens)
    return far.scatter_add(3, places, near)[..., : max(state.lengths)]


def spare_places(state: State, name: str, window: Window) -> int:
    """How many tokens can be written before any is read, without losing one that a
    window reaches.

    A store that grows loses none, but many tokens at once are still better read in
    tiles.
    """
    limit = state.limit(name)
    return MIN_BLOCK if limit is None else limit - window.reach + 1
