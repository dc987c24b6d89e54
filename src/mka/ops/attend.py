"""The one softmax seam: every attention over tokens is one of these functions, on scaled_dot_product_attention.

Shapes: q (B, T, H, D), k and v (B, S, G, D), G divides H; tensors are transposed here and nowhere else.
A query with nothing to attend to gives zeros. Each function returns a `Read`; its log-sum-exp is there where it was
asked for (`lse`), by which several reads become one softmax (`shares_of`).
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
LARGEST_RATIO = 60.0
"""A read with a factor weighs at most e to this power times its factor, in units of the others: shut is shut."""
QUERY_TILE, MASK_SIZE = 512, 2**24
"""Queries under one mask with `attend_at`: at most this many, and a mask of at most this many elements a row."""


class Read(NamedTuple):
    """What queries read: the values (B, T, H, D), and the log-sum-exp of their scores (B, T, H)."""

    values: Tensor
    lse: Tensor | None = None

    @property
    def sums(self) -> Tensor:
        """The log-sum-exps. Raises ValueError where nobody asked for them."""
        if self.lse is None:
            raise ValueError("the log-sum-exps of this read were not asked for: lse=True")
        return self.lse


class Window(NamedTuple):
    """Which tokens s a token t sees: the latest `size`, itself among them, and the first `sinks` of the row.

    `chunk`: the window reaches back to the beginning of the chunk of so many tokens in which it would begin. `until`:
    tokens after this one (None: no token) do not see the sinks here: they read them apart, at a distance of their own.
    """

    size: int
    sinks: int = 0
    chunk: int = 1
    until: int | None = None

    @property
    def reach(self) -> int:
        """Tokens, itself included, that a window has at most; sinks before it are not counted."""
        return self.size + self.chunk - 1

    def start(self, t: Tensor) -> Tensor:
        """The first token of the window of t; below 0 where the row is shorter."""
        return (t + 1 - self.size).div(self.chunk, rounding_mode="floor") * self.chunk

    def sees(self, t: Tensor, s: Tensor) -> Tensor:
        """Whether t sees s, for tensors that broadcast; a negative s is no token."""
        sink = s < self.sinks
        if self.until is not None:
            sink = sink & (t <= self.until)
        return (s >= 0) & (s <= t) & ((s >= self.start(t)) | sink)

    def tokens_seen(self, context: int) -> int:
        """Tokens that the last of `context` tokens sees."""
        first = max(0, (context - self.size) // self.chunk * self.chunk)
        return context - first + min(self.sinks, first)


def both(a: Read, b: Read, *, lse: bool = True) -> Read:
    """One softmax over what two reads have read; of two that read nothing, nothing."""
    sums = torch.stack([a.sums, b.sums])
    empty = (sums == -torch.inf).all(0)
    sums = sums.masked_fill(empty, 0)
    total = sums.logsumexp(0)
    weights = (sums - total).exp().to(a.values.dtype).unsqueeze(-1)
    return Read(
        sum_of([weights[0] * a.values, weights[1] * b.values]), total.masked_fill(empty, -torch.inf) if lse else None
    )


def with_empty(read: Read, logits: Tensor) -> Read:
    """One softmax over what was read and a key of score `logits` (H,), which has no value."""
    sums = read.sums
    logits = logits.to(sums.dtype)
    share = torch.sigmoid(sums - logits).to(read.values.dtype)
    return Read(read.values * share.unsqueeze(-1), torch.logaddexp(sums, logits.expand_as(sums)))


def shares_of(reads: Sequence[Read], biases: Sequence[Tensor | None], factors: Sequence[Tensor | None]) -> Tensor:
    """The weight (N, B, T, H) of each of N reads in one softmax over what all of them have read.

    biases (B, T, H) are added to the scores of a read; a factor () from 0 on multiplies its weight, and is no part of
    the scores because a factor of 0 has a gradient. The first read must have read something at every query.
    """
    pairs = zip(reads, biases, strict=True)
    sums = torch.stack([read.sums if bias is None else read.sums + bias for read, bias in pairs])
    if all(factor is None for factor in factors):
        return sums.softmax(0)
    highest = torch.stack([each for each, factor in zip(sums, factors, strict=True) if factor is None]).amax(0)
    weights = (sums - highest.detach()).clamp(max=LARGEST_RATIO).exp()
    weights = torch.stack([w if factor is None else w * factor for w, factor in zip(weights, factors, strict=True)])
    return weights / weights.sum(0)


def mixed(weights: Tensor, reads: Sequence[Read]) -> Tensor:
    """(B, T, H, D), in the dtype of the reads: their sum with weights (N, B, T, H)."""
    weights = weights.to(reads[0].values.dtype).unsqueeze(-1)
    return sum_of([weight * read.values for weight, read in zip(weights, reads, strict=True)])


def sum_of(parts: Sequence[Tensor]) -> Tensor:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def attend_causal(
    q: Tensor, k: Tensor, v: Tensor, window: Window | None = None, scale: float | None = None, *, lse: bool = False
) -> Read:
    """Causal attention, S = T, over the window (None: all tokens before).

    v may be narrower than k; it is padded to k's width, because differing widths leave the fused kernel.
    Returns (B, T, H, width of v). Memory is linear in T.
    """
    width = v.shape[-1]
    if width != k.shape[-1]:
        v = pad(v, (0, k.shape[-1] - width))
    if window is None or q.shape[1] <= window.size:
        read = attend(q, k, v, scale=scale, lse=lse)
    else:
        sinks = k[:, : window.sinks], v[:, : window.sinks]
        read = attend_window(q, k, v, sinks, window, 0, scale, lse=lse)
    return Read(read.values[..., :width], read.lse)


def attend_masked(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None, *, lse: bool = False
) -> Read:
    """Attention where `mask` is True: (T, S) for all, or (B, T, G, S) for each row and key/value head."""
    if mask.dim() == 2:
        return attend(q, k, v, scale=scale, mask=mask, lse=lse)
    batch, tokens, heads, width = q.shape
    groups = k.shape[2]
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
    """Causal attention by index: a query at t sees the keys that its window (None: all before it) has.

    query (B or 1, T) and key (B or 1, S) are the indices; a negative key is an empty place. Where the keys after the
    first `kept` stand in order, `newest(i)` is the column of the last one that query i sees: what no query of a tile
    sees is left out. Keys may be of another dtype, that of a cache.
    """
    tokens, slots, given = q.shape[1], k.shape[1], q.dtype
    q = q.to(k.dtype)
    tile = max(1, min(QUERY_TILE, MASK_SIZE // max(1, slots)))
    if window is not None and newest is not None:
        tile = min(tile, max(window.reach, MIN_BLOCK))
    reads = []
    for start in range(0, tokens, tile):
        stop = min(start + tile, tokens)
        first = 0 if newest is None or window is None else max(kept, newest(start) - window.reach + 1)
        last = slots if newest is None else newest(stop - 1) + 1
        if first <= kept:
            columns = slice(0, last)
            keys, values, numbers = k[:, columns], v[:, columns], key[:, columns]
        else:
            keys, values, numbers = (torch.cat([x[:, :kept], x[:, first:last]], dim=1) for x in (k, v, key))
        if not keys.shape[1]:
            reads.append(nothing(q[:, start:stop], lse=lse))
            continue
        t, s = query[:, start:stop, None], numbers[:, None]
        mask = (s >= 0) & (s <= t) if window is None else window.sees(t, s)
        reads.append(attend(q[:, start:stop], keys, values, scale=scale, mask=mask.unsqueeze(1), lse=lse))
    return each(joined(reads), lambda x: x.to(given), values_only=True)


def attend_all(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, *, lse: bool = False) -> Read:
    """Attention of every query to every key. The heads of a group are queries of one head: its keys are read once."""
    tokens, groups = q.shape[1], k.shape[2]
    queries = q.to(k.dtype).unflatten(2, (groups, -1)).transpose(2, 3).flatten(1, 2)
    mask = torch.ones(1, k.shape[1], dtype=torch.bool, device=q.device) if lse else None
    read = attend(queries, k, v, scale=scale, mask=mask, lse=lse, causal=False)
    read = each(read, lambda x: x.unflatten(1, (tokens, -1)).transpose(2, 3).flatten(2, 3))
    return each(read, lambda x: x.to(q.dtype), values_only=True)


def attention_weights(
    q: Tensor, k: Tensor, query: Tensor, key: Tensor, window: Window | None = None, scale: float | None = None
) -> Tensor:
    """The weights (B, H, T, S) with which `attend_at` reads, float32 or better; they are stored, T x S of each head."""
    groups = k.shape[2]
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    scores = torch.einsum("btgnd,bsgd->bgnts", q.unflatten(2, (groups, -1)), k).flatten(1, 2) * scale
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
    """The window, exactly, for queries at `first`, `first` + 1, ...: a block of them reads its own keys and one more.

        keys      sinks   block n-1   block n
        query 0   # #     . . # # #   #
        query 1   # #     . . . # #   # #           one mask serves every block that has no sink among its keys
        query 2   # #     . . . . #   # # #

    The keys k and v (B, S, G, D) end with the last query's and are at least those that the windows reach, or all
    there are; the row's first tokens stand in `sinks` too.
    """
    tokens, before = q.shape[1], k.shape[1] - q.shape[1]
    size = -(-max(window.reach, MIN_BLOCK) // window.chunk) * window.chunk
    if before >= size:
        k, v, before = k[:, before - size :], v[:, before - size :], size
    ahead = -tokens % size
    q = pad(q, (0, 0, 0, 0, 0, ahead)) if ahead else q
    if ahead or before < size:
        k, v = (pad(x, (0, 0, 0, 0, size - before, ahead)) for x in (k, v))
    blocks, count = q.shape[1] // size, sinks[0].shape[1]
    t, own = torch.arange(size, device=q.device)[:, None], torch.arange(-size, size, device=q.device)
    numbers = torch.arange(count, device=q.device)
    near = min(blocks, max(0, -(-(size + window.sinks - first) // size)))
    reads = []
    for n in range(near):  # blocks whose keys are not all there, or have sinks among them
        begin = first + n * size
        earliest = max(first - before, begin - size)
        empty = earliest - (begin - size)
        here = torch.cat([torch.where(numbers < earliest, numbers, -1), begin + own[empty:]])
        span = slice(n * size + empty, (n + 2) * size)
        keys, values = (torch.cat([x, y[:, span]], dim=1) for x, y in zip(sinks, (k, v), strict=True))
        mask = window.sees(begin + t, here)
        reads.append(attend(q[:, n * size : (n + 1) * size], keys, values, scale=scale, mask=mask, lse=lse))
    if blocks > near:
        begin, rest, parts = first + near * size, blocks - near, []
        mask = window.sees(begin + t, torch.cat([numbers, begin + own]))
        if window.until is not None and first + blocks * size > window.until + 1:  # masks differ in their sinks
            starts = begin + size * torch.arange(rest, device=q.device)[:, None, None]
            mask = mask.expand(rest, -1, -1).clone()
            mask[..., :count] = starts + t <= window.until
            mask = mask.repeat(q.shape[0], 1, 1).unsqueeze(1)
        for x, y in zip(sinks, (k, v), strict=True):
            y = y[:, near * size :].unflatten(1, (rest + 1, size))
            parts.append(torch.cat([x.unsqueeze(1).expand(-1, rest, -1, -1, -1), y[:, :-1], y[:, 1:]], 2).flatten(0, 1))
        queries = q[:, near * size :].unflatten(1, (rest, size)).flatten(0, 1)
        read = attend(queries, *parts, scale=scale, mask=mask, lse=lse)
        reads.append(each(read, lambda x: x.unflatten(0, (-1, rest)).flatten(1, 2)))
    return each(joined(reads), lambda x: x[:, :tokens])


def each(read: Read, change: Callable[[Tensor], Tensor], *, values_only: bool = False) -> Read:
    return Read(change(read.values), read.lse if read.lse is None or values_only else change(read.lse))


def joined(reads: Sequence[Read]) -> Read:
    """Side by side along the queries."""
    if len(reads) == 1:
        return reads[0]
    values, sums = zip(*reads, strict=True)
    return Read(torch.cat(values, dim=1), None if sums[0] is None else torch.cat(sums, dim=1))


def nothing(q: Tensor, *, lse: bool = True) -> Read:
    """What queries (B, T, H, D) read where there is nothing."""
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
    """One call of a kernel; without a mask causal, S = T, or else over everything. mask: (T, S), (B, 1 or H, T, S)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if lse:
        scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
        out, sums = attention_with_lse(q, k.to(q.dtype), v.to(q.dtype), mask, scale)
        return Read(out.transpose(1, 2), sums.transpose(1, 2))
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda and (mask is not None or q.dtype in (torch.float32, torch.float64)):
        # CUDA's kernels for masks and for float32 do not share heads; without this T x T scores would be stored.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        grouped = False
    causal = causal and mask is None
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=grouped)
    return Read(out.transpose(1, 2))
