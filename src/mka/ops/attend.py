"""The one softmax seam: every attention of the project is one of these functions, on scaled_dot_product_attention.

Shapes: q (B, T, H, D), k and v (B, S, G, D), G divides H; tensors are transposed here and nowhere else.
A query with nothing to attend to gives zeros.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

MIN_BLOCK = 64
QUERY_TILE, MASK_SIZE = 512, 2**24
"""Queries under one mask with `attend_at`: at most this many, and a mask of at most this many elements a row."""


def attend_causal(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, scale: float | None = None) -> Tensor:
    """Causal attention, S = T, over the latest `window` tokens (None: all of them).

    v may be narrower than k; it is padded to k's width, because differing widths leave the fused kernel.
    Returns (B, T, H, width of v). Memory is linear in T.
    """
    width = v.shape[-1]
    if width != k.shape[-1]:
        v = pad(v, (0, k.shape[-1] - width))
    if window is None or q.shape[1] <= window:
        return _sdpa(q, k, v, scale=scale, is_causal=True)[..., :width]
    return _attend_blocks(q, k, v, window, scale)[..., :width]


def attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Attention where `mask` is True: (T, S) for all, or (B, T, G, S) for each row and key/value head."""
    if mask.dim() == 2:
        return _sdpa(q, k, v, scale=scale, mask=mask)
    batch, tokens, heads, width = q.shape
    groups = k.shape[2]
    q = q.reshape(batch, tokens, groups, heads // groups, width).transpose(1, 2).flatten(0, 1)
    k, v = (x.transpose(1, 2).flatten(0, 1).unsqueeze(2) for x in (k, v))
    mask = mask.transpose(1, 2).flatten(0, 1).unsqueeze(1)
    out = _sdpa(q, k, v, scale=scale, mask=mask)
    return out.unflatten(0, (batch, groups)).transpose(1, 2).flatten(2, 3)


def attend_at(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query: Tensor,
    key: Tensor,
    window: int | None = None,
    *,
    newest: Callable[[int], int] | None = None,
    scale: float | None = None,
) -> Tensor:
    """Causal attention by index: a query at t sees the keys at t - window + 1 .. t.

    query (B or 1, T) and key (B or 1, S) are the indices; a negative key is an empty place. Where the keys stand in
    order, `newest(i)` is the column of the last one that query i sees: what no query of a tile sees is left out.
    Keys may be of another dtype, that of a cache.
    """
    tokens, slots, given = q.shape[1], k.shape[1], q.dtype
    q = q.to(k.dtype)
    tile = max(1, min(QUERY_TILE, MASK_SIZE // max(1, slots)))
    if window is not None and newest is not None:
        tile = min(tile, max(window, MIN_BLOCK))
    reads = []
    for start in range(0, tokens, tile):
        stop = min(start + tile, tokens)
        first = 0 if newest is None or window is None else max(0, newest(start) - window + 1)
        last = slots if newest is None else newest(stop - 1) + 1
        if first >= last:
            reads.append(q.new_zeros(q.shape[0], stop - start, *q.shape[2:]))
            continue
        t, s = query[:, start:stop, None], key[:, None, first:last]
        mask = (s >= 0) & (s <= t)
        if window is not None:
            mask &= s > t - window
        reads.append(_sdpa(q[:, start:stop], k[:, first:last], v[:, first:last], scale=scale, mask=mask.unsqueeze(1)))
    return (reads[0] if len(reads) == 1 else torch.cat(reads, dim=1)).to(given)


def attend_all(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Attention of every query to every key. The heads of a group are queries of one head: its keys are read once."""
    tokens, groups = q.shape[1], k.shape[2]
    queries = q.to(k.dtype).unflatten(2, (groups, -1)).transpose(2, 3).flatten(1, 2)
    out = _sdpa(queries, k, v, scale=scale)
    return out.unflatten(1, (tokens, -1)).transpose(2, 3).flatten(2, 3).to(q.dtype)


def attention_weights(
    q: Tensor, k: Tensor, query: Tensor, key: Tensor, window: int | None = None, scale: float | None = None
) -> Tensor:
    """The weights (B, H, T, S) with which `attend_at` reads, float32 or better; they are stored, T x S of each head."""
    groups = k.shape[2]
    if scale is None:
        scale = 1 / math.sqrt(q.shape[-1])
    q, k = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k))
    scores = torch.einsum("btgnd,bsgd->bgnts", q.unflatten(2, (groups, -1)), k).flatten(1, 2) * scale
    t, s = query[:, None, :, None], key[:, None, None, :]
    seen = (s >= 0) & (s <= t)
    if window is not None:
        seen = seen & (s > t - window)
    return scores.masked_fill(~seen, float("-inf")).softmax(-1)


def _attend_blocks(q: Tensor, k: Tensor, v: Tensor, window: int, scale: float | None) -> Tensor:
    """The window, exactly: a block of queries reads its own block of keys and the one before.

    keys      block n-1   block n
    query 0   . . # # #   #
    query 1   . . . # #   # #           one band mask serves every block but the first
    query 2   . . . . #   # # #
    """
    tokens = q.shape[1]
    size = max(window, MIN_BLOCK)
    if tokens % size:
        q, k, v = (pad(x, (0, 0, 0, 0, 0, -tokens % size)) for x in (q, k, v))
    band = _band(size, 2 * size, window, q.device)
    first = _sdpa(q[:, :size], k[:, :size], v[:, :size], scale=scale, mask=band[:, size:])
    if q.shape[1] == size:
        return first[:, :tokens]
    q, k, v = (x.unflatten(1, (-1, size)) for x in (q, k, v))
    k, v = (torch.cat([x[:, :-1], x[:, 1:]], dim=2).flatten(0, 1) for x in (k, v))
    rest = _sdpa(q[:, 1:].flatten(0, 1), k, v, scale=scale, mask=band)
    rest = rest.unflatten(0, (q.shape[0], -1)).flatten(1, 2)
    return torch.cat([first, rest], dim=1)[:, :tokens]


def _band(rows: int, columns: int, window: int, device: torch.device) -> Tensor:
    """(rows, columns) bool; the last row sees the last `window` columns, each row above one column earlier."""
    last = torch.arange(columns - rows, columns, device=device)[:, None]
    column = torch.arange(columns, device=device)
    return (column <= last) & (column > last - window)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None, mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.is_cuda and (mask is not None or q.dtype in (torch.float32, torch.float64)):
        # CUDA's kernels for masks and for float32 do not share heads; without this T x T scores would be stored.
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        grouped = False
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=grouped)
    return out.transpose(1, 2)
