"""Attention over tokens: windowed, masked or by index, on scaled_dot_product_attention.

Shapes: q (B, T, H, D), k and v (B, S, G, D), G divides H; callers keep this order of
dimensions, and these functions transpose to that of the kernels. A query that sees no
key reads zeros. Each function returns a `Read`. With `lse=True` it also holds the
log-sum-exp of the scores, by which several reads become one softmax (`both`,
`shares_of`).
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from mka.ops.fused import attention_with_lse
from mka.ops.precision import upcast

MIN_BLOCK = 64
"""Smallest tile of queries, in tokens, that a window is read in: a shorter window would
make many small products."""
LARGEST_RATIO = 60.0
"""Cap, in nats, on how far the log-sum-exp of a read may exceed the largest one without
a factor: exp() stays finite (float32 overflows at 88), so a factor of 0 gives a weight
of 0, not NaN."""
QUERY_TILE, MASK_SIZE = 512, 2**24
"""Limits of one mask in `attend_at`: the number of queries, and the elements per
row."""


class Read(NamedTuple):
    """What queries read: the values (B, T, H, D), and the log-sum-exp of their scores
    (B, T, H).

    `lse` is None where it was not asked for, and -inf where a query saw no key.
    """

    values: Tensor
    lse: Tensor | None = None

    @property
    def sums(self) -> Tensor:
        """The log-sum-exps (B, T, H). Raises ValueError if they were not asked for."""
        if self.lse is None:
            raise ValueError("the log-sum-exps of this read were not asked for: lse=True")
        return self.lse


class Window(NamedTuple):
    """Which tokens s a token t sees: the latest ones, itself included, and the sinks of
    its row.

    Args (all in tokens):
        size: the latest tokens that are seen, t included.
        sinks: first tokens of the row that are always seen. Default: 0.
        chunk: the window is extended back to the beginning of the chunk, of this many
            tokens, in which it would begin, so that no token lies between window and
            chunks. Default: 1, exactly `size`.
        until: tokens with an index above this do not see the sinks here, because they
            read them separately, at another distance (`mka.memory.local.read_sinks`).
            Default: None, all tokens see them here.
    """

    size: int
    sinks: int = 0
    chunk: int = 1
    until: int | None = None

    @property
    def reach(self) -> int:
        """The most tokens that a window can have, t included; sinks before it are not
        counted."""
        return self.size + self.chunk - 1

    def start(self, t: Tensor) -> Tensor:
        """The first token in the window of t, rounded down to a chunk; it may be
        negative."""
        return (t + 1 - self.size).div(self.chunk, rounding_mode="floor") * self.chunk

    def sees(self, t: Tensor, s: Tensor) -> Tensor:
        """Whether t sees s, for index tensors that broadcast; a negative s is an empty
        place."""
        sink = s < self.sinks
        if self.until is not None:
            sink = sink & (t <= self.until)
        return (s >= 0) & (s <= t) & ((s >= self.start(t)) | sink)

    def tokens_seen(self, context: int) -> int:
        """How many tokens the last of `context` tokens sees."""
        first = max(0, (context - self.size) // self.chunk * self.chunk)
        return context - first + min(self.sinks, first)


def both(a: Read, b: Read, *, lse: bool = True) -> Read:
    """Merge two reads as one softmax over the keys of both; zeros where both are empty.

    Both need their log-sum-exps. Returns a read that has its own where `lse` is True.
    """
    sums = torch.stack([a.sums, b.sums])
    # Where neither read anything, -inf - -inf would be NaN, forward and backward. With
    # 0 for both, the two zero values get finite weights.
    empty = (sums == -torch.inf).all(0)
    sums = sums.masked_fill(empty, 0)
    total = sums.logsumexp(0)
    weights = (sums - total).exp().to(a.values.dtype).unsqueeze(-1)
    return Read(
        sum_of([weights[0] * a.values, weights[1] * b.values]),
        total.masked_fill(empty, -torch.inf) if lse else None,
    )


def with_empty(read: Read, logits: Tensor) -> Read:
    """One softmax over what was read and one more key per head, of score `logits` (H,)
    and value 0.

    Returns (B, T, H, D) and log-sum-exps that include the extra key.
    """
    sums = read.sums
    logits = logits.to(sums.dtype)
    # exp(s) / (exp(s) + exp(logit)), written so that neither exponential can overflow.
    share = torch.sigmoid(sums - logits).to(read.values.dtype)
    return Read(read.values * share.unsqueeze(-1), torch.logaddexp(sums, logits.expand_as(sums)))


def shares_of(
    reads: Sequence[Read], biases: Sequence[Tensor | None], factors: Sequence[Tensor | None]
) -> Tensor:
    """The weight (N, B, T, H) of each of N reads in one softmax over what all of them
    have read.

    Args:
        reads: N reads with log-sum-exps. The first has no factor, and has read
            something at every query.
        biases: per read, (B, T, H) to add to its scores, or None.
        factors: per read, a scalar tensor of at least 0 that multiplies its weight, or
            None. It is not added to the scores as a logarithm, because a factor of 0
            must have a gradient.
    """
    pairs = zip(reads, biases, strict=True)
    sums = torch.stack([read.sums if bias is None else read.sums + bias for read, bias in pairs])
    if all(factor is None for factor in factors):
        return sums.softmax(0)
    # Only reads without a factor set the scale: one that is switched off (factor 0)
    # must not push the others below the smallest float. A common shift cancels below,
    # hence detach().
    unscaled = [each for each, factor in zip(sums, factors, strict=True) if factor is None]
    highest = torch.stack(unscaled).amax(0)
    weights = (sums - highest.detach()).clamp(max=LARGEST_RATIO).exp()
    weights = torch.stack(
        [w if factor is None else w * factor for w, factor in zip(weights, factors, strict=True)]
    )
    return weights / weights.sum(0)


def mixed(weights: Tensor, reads: Sequence[Read]) -> Tensor:
    """The sum (B, T, H, D) of N reads with weights (N, B, T, H), in the dtype of the
    reads."""
    weights = weights.to(reads[0].values.dtype).unsqueeze(-1)
    return sum_of([weight * read.values for weight, read in zip(weights, reads, strict=True)])


def sum_of(parts: Sequence[Tensor]) -> Tensor:
    """The sum of one or more tensors of the same shape."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def attend_causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window | None = None,
    scale: float | None = None,
    *,
    lse: bool = False,
) -> Read:
    """Causal attention, S = T, over the window (None: all earlier tokens and the token
    itself).

    v may be narrower than k. `scale` is that of the scores (None: 1 / sqrt(D)). Returns
    (B, T, H, width of v). Memory is linear in T.
    """
    width = v.shape[-1]
    # With differing widths the fused kernels do not apply, and T x T scores would be
    # stored.
    if width != k.shape[-1]:
        v = pad(v, (0, k.shape[-1] - width))
    # A row no longer than its window is plain causal attention: the sinks lie in the
    # window.
    if window is None or q.shape[1] <= window.size:
        read = attend(q, k, v, scale=scale, lse=lse)
    else:
        sinks = k[:, : window.sinks], v[:, : window.sinks]
        read = attend_window(q, k, v, sinks, window, 0, scale, lse=lse)
    return Read(read.values[..., :width], read.lse)


def attend_masked(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None, *, lse: bool = False
) -> Read:
    """Attention to the keys where `mask` is True.

    mask (T, S) holds for all rows and heads, (B, T, G, S) for each row and key/value
    head.
    """
    if mask.dim() == 2:
        return attend(q, k, v, scale=scale, mask=mask, lse=lse)
    batch, tokens, heads, width = q.shape
    groups = k.shape[2]
    # Each (row, group) becomes a row with one key/value head, whose H / G query heads
    # share a mask (T, S); over (B, H) the same mask would have to be repeated for every
    # head.
    q = q.reshape(batch, tokens, groups, heads // groups, width).transpose(1, 2).flatten(0, 1)
    k, v = (x.transpose(1, 2).flatten(0, 1).unsqueeze(2) for x in (k, v))
    mask = mask.transpose(1, 2).flatten(0, 1).unsqueeze(1)
    read = attend(q, k, v, scale=scale, mask=mask, lse=lse)
    return each(read, lambda x: x.unflatten(0, (batch, groups)).transpose(1, 2).flatten(2, 3))


def attend_at(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query: Tensor,
    key: Tensor,
    window: Window | None = None,
    *,
    newest: Callable[[int], int] | None = None,
    kept: int = 0,
    scale: float | None = None,
    lse: bool = False,
) -> Read:
    """Causal attention by index: a query at t sees the keys in its window, wherever they lie.

    Args:
        q: (B, T, H, D).
        k, v: (B, S, G, D), in any dtype (that of a cache).
        query, key: (B or 1, T) and (B or 1, S), token indices; a negative key is an empty place.
        window: what t sees. Default: None, every key up to t.
        newest: `newest(i)` is the column of the last key that query i sees, if the keys after the
            first `kept` are in order; keys that no query of a tile sees are then left out.
            Default: None, in no particular order.
        kept: columns in front, such as sinks, that every tile reads. Default: 0.
        scale: factor of the scores. Default: None, 1 / sqrt(D).

    Returns (B, T, H, D) in the dtype of q.
    """
    tokens, slots, given = q.shape[1], k.shape[1], q.dtype
    # The queries take the dtype of the keys, not the reverse: a cache holds many more
    # keys.
    q = q.to(k.dtype)
    tile = max(1, min(QUERY_TILE, MASK_SIZE // max(1, slots)))
    # A tile reads the keys of all of its windows, reach + tile of them: one that is
    # longer than the reach would mostly multiply keys that are masked.
    if window is not None and newest is not None:
        tile = min(tile, max(window.reach, MIN_BLOCK))
    reads = []
    for start in range(0, tokens, tile):
        stop = min(start + tile, tokens)
        # No query of the tile sees a key before the window of its first query, at its
        # widest.
        first = (
            0 if newest is None or window is None else max(kept, newest(start) - window.reach + 1)
        )
        last = slots if newest is None else newest(stop - 1) + 1
        # Without a gap after the kept columns a slice, which is a view, saves the copy.
        if first <= kept:
            columns = slice(0, last)
            keys, values, numbers = k[:, columns], v[:, columns], key[:, columns]
        else:
            keys, values, numbers = (
                torch.cat([x[:, :kept], x[:, first:last]], dim=1) for x in (k, v, key)
            )
        # A softmax over zero keys is undefined.
        if not keys.shape[1]:
            reads.append(nothing(q[:, start:stop], lse=lse))
            continue
        t, s = query[:, start:stop, None], numbers[:, None]
        mask = (s >= 0) & (s <= t) if window is None else window.sees(t, s)
        reads.append(
            attend(q[:, start:stop], keys, values, scale=scale, mask=mask.unsqueeze(1), lse=lse)
        )
    return each(joined(reads), lambda x: x.to(given), values_only=True)


def attend_all(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, lse: bool = False
) -> Read:
    """Attention of every query to every key, without a mask.

    The heads of a group are laid out as queries of one head, so that its keys are read
    once.
    """
    tokens, groups = q.shape[1], k.shape[2]
    queries = q.to(k.dtype).unflatten(2, (groups, -1)).transpose(2, 3).flatten(1, 2)
    # Where log-sum-exps are asked for, no mask means causal (`attention_with_lse`).
    mask = torch.ones(1, k.shape[1], dtype=torch.bool, device=q.device) if lse else None
    read = attend(queries, k, v, scale=scale, mask=mask, lse=lse, causal=False)
    read = each(read, lambda x: x.unflatten(1, (tokens, -1)).transpose(2, 3).flatten(2, 3))
    return each(read, lambda x: x.to(q.dtype), values_only=True)


def attention_weights(
    q: Tensor,
    k: Tensor,
    query: Tensor,
    key: Tensor,
    window: Window | None = None,
    scale: float | None = None,
) -> Tensor:
    """The weights (B, H, T, S) with which `attend_at` reads, in float32 or better.

    They are stored in full, T x S per head: for looking at, not for training.
    """
    groups = k.shape[2]
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    scores = (
        torch.einsum("btgnd,bsgd->bgnts", q.unflatten(2, (groups, -1)), k).flatten(1, 2) * scale
    )
    t, s = query[:, None, :, None], key[:, None, None, :]
    seen = (s >= 0) & (s <= t) if window is None else window.sees(t, s)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1)


def attend_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: tuple[Tensor, Tensor],
    window: Window,
    first: int,
    scale: float | None = None,
    *,
    lse: bool = False,
) -> Read:
    """The window, exactly, for queries at `first`, `first` + 1, ..., in tiles.

    A tile of queries reads the sinks, the keys of the tile before it, and its own:

        keys      sinks   tile n-1    tile n
        query 0   # #     . . # # #   #
        query 1   # #     . . . # #   # #           one mask serves every tile that has
        query 2   # #     . . . . #   # # #         no sinks among its keys

    Args:
        q: (B, T, H, D).
        k, v: (B, S, G, D), in order; they end with the last query's own, and include all that the
            windows reach, or all that exist.
        sinks: keys and values of the row's first tokens, (B, N, G, D); they may be in k and v too.
        window: what a token sees.
        first: token index of the first query.
        scale: factor of the scores. Default: None, 1 / sqrt(D).
    """
    tokens, before = q.shape[1], k.shape[1] - q.shape[1]
    # At least the reach, so that one earlier tile is enough; a multiple of the chunk,
    # so that the windows begin at the same offsets in every tile and one mask serves
    # them all.
    size = -(-max(window.reach, MIN_BLOCK) // window.chunk) * window.chunk
    if before >= size:
        k, v, before = k[:, before - size :], v[:, before - size :], size
    # Whole tiles only: padding in front lies outside every window, padding behind after
    # every query.
    ahead = -tokens % size
    q = pad(q, (0, 0, 0, 0, 0, ahead)) if ahead else q
    if ahead or before < size:
        k, v = (pad(x, (0, 0, 0, 0, size - before, ahead)) for x in (k, v))
    tiles, count = q.shape[1] // size, sinks[0].shape[1]
    t, own = (
        torch.arange(size, device=q.device)[:, None],
        torch.arange(-size, size, device=q.device),
    )
    numbers = torch.arange(count, device=q.device)
    # The first `near` tiles have sinks among the keys of the tile before them, or reach
    # back beyond the row: each needs a mask of its own.
    near = min(tiles, max(0, -(-(size + window.sinks - first) // size)))
    reads = []
    for n in range(near):
        begin = first + n * size
        # A sink that is among the tile's keys is marked as an empty place (-1) among
        # the sinks: a token counts once.
        earliest = max(first - before, begin - size)
        empty = earliest - (begin - size)
        here = torch.cat([torch.where(numbers < earliest, numbers, -1), begin + own[empty:]])
        span = slice(n * size + empty, (n + 2) * size)
        keys, values = (
            torch.cat([x, y[:, span]], dim=1) for x, y in zip(sinks, (k, v), strict=True)
        )
        mask = window.sees(begin + t, here)
        reads.append(
            attend(q[:, n * size : (n + 1) * size], keys, values, scale=scale, mask=mask, lse=lse)
        )
    # The other tiles differ only in their place, so they are rows of one call with one
    # mask.
    if tiles > near:
        begin, rest, parts = first + near * size, tiles - near, []
        mask = window.sees(begin + t, torch.cat([numbers, begin + own]))
        # Beyond `until` the sinks are not read here, so the masks differ in the sinks'
        # columns.
        if window.until is not None and first + tiles * size > window.until + 1:
            starts = begin + size * torch.arange(rest, device=q.device)[:, None, None]
            mask = mask.expand(rest, -1, -1).clone()
            mask[..., :count] = starts + t <= window.until
            mask = mask.repeat(q.shape[0], 1, 1).unsqueeze(1)
        for x, y in zip(sinks, (k, v), strict=True):
            # One tile of keys more than of queries: the first looks back to it.
            y = y[:, near * size :].unflatten(1, (rest + 1, size))
            parts.append(
                torch.cat(
                    [x.unsqueeze(1).expand(-1, rest, -1, -1, -1), y[:, :-1], y[:, 1:]], 2
                ).flatten(0, 1)
            )
        queries = q[:, near * size :].unflatten(1, (rest, size)).flatten(0, 1)
        read = attend(queries, *parts, scale=scale, mask=mask, lse=lse)
        reads.append(each(read, lambda x: x.unflatten(0, (-1, rest)).flatten(1, 2)))
    return each(joined(reads), lambda x: x[:, :tokens])


def each(read: Read, change: Callable[[Tensor], Tensor], *, values_only: bool = False) -> Read:
    """The read with `change` applied to its values, and unless `values_only` to its
    `lse`."""
    return Read(
        change(read.values), read.lse if read.lse is None or values_only else change(read.lse)
    )


def joined(reads: Sequence[Read]) -> Read:
    """Reads of consecutive queries as one, concatenated along T."""
    if len(reads) == 1:
        return reads[0]
    values, sums = zip(*reads, strict=True)
    return Read(torch.cat(values, dim=1), None if sums[0] is None else torch.cat(sums, dim=1))


def nothing(q: Tensor, *, lse: bool = True) -> Read:
    """The read of queries (B, T, H, D) that see no key: zeros, and log-sum-exps of
    -inf."""
    return Read(torch.zeros_like(q), upcast(q.new_full(q.shape[:3], -torch.inf)) if lse else None)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None,
    mask: Tensor | None = None,
    lse: bool = False,
    causal: bool = True,
) -> Read:
    """One call of a kernel.

    Args:
        q: (B, T, H, D).
        k, v: (B, S, G, D).
        scale: factor of the scores (None: 1 / sqrt(D)).
        mask: bool, (T, S) or (B, 1 or H, T, S), True where a key is seen. Default:
            None, see `causal`.
        lse: also return the log-sum-exps. Without a mask that is always causal.
        causal: without a mask, causal attention with S = T (True, the default), or
            attention to every key (False).
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if lse:
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        out, sums = attention_with_lse(q, k.to(q.dtype), v.to(q.dtype), mask, scale)
        return Read(out.transpose(1, 2), sums.transpose(1, 2))
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda and (mask is not None or q.dtype in (torch.float32, torch.float64)):
        # CUDA's kernels for masks, and those for float32, do not share key/value heads;
        # without repeating them PyTorch falls back to a path that stores T x S scores.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        grouped = False
    causal = causal and mask is None
    out = scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    return Read(out.transpose(1, 2))
