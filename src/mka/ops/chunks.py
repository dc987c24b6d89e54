"""Attention of each query to the tokens of a few chunks of its own choice, chunk by chunk.

    pairs (query, chunk) as chosen     sorted by chunk          blocks of P pairs with one chunk
    q0: 2 0   q1: 0 1   q2: 2 0        0: q0 q1 q2              0: q0 q1 | q2 -      a block is a dense product of
    q3: 1 2                            1: q1 q3                 1: q1 q3             its queries with the c keys
                                       2: q0 q2 q3              2: q0 q2 | q3 -      of its chunk

What a query reads in its K chunks is merged by the sums of their exponentials, as in MoBA (arXiv 2502.13189). The cost
is that of K c keys a query, however many there are, and a chunk is loaded once for P of the queries that chose it.

Shapes: q (B, T, H, D), k and v (B, S, G, D), chunk and found (B, T, G, K), seen (S,) the tokens that are read at all
(None: all); c = chunk_size, J = S // c, R = H / G.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from mka.ops.precision import wide, without_autocast

QUERY_PAIRS = 2**16
"""Pairs of the queries that are sorted together: what is stored besides the result does not grow with T."""
BLOCK = 16
"""Pairs that are a dense product with their chunk."""
BLOCKS = 2**9
"""Blocks multiplied at once."""


class Blocks(NamedTuple):
    """N blocks that are multiplied at once, in float32 or better.

    segment (N,) = (row G + group) J + chunk. pair (N P,) counts those of the tile's (B, T, G, K), query = pair // K
    its (B, T, G); where a place of a block is empty, pair is one past the last, and query any.
    """

    segment: Tensor
    pair: Tensor
    query: Tensor
    queries: Tensor
    """(N, P R, D), scaled"""
    keys: Tensor
    """(N, c, D)"""
    values: Tensor
    """The same; keys where values are of no interest"""
    hidden: Tensor | None
    """(N, 1, c)"""

    def scores(self) -> Tensor:
        """(N, P R, c)"""
        scores = self.queries @ self.keys.transpose(1, 2)
        return scores if self.hidden is None else scores.masked_fill_(self.hidden, -torch.inf)


@torch.library.custom_op("mka::chunk_attention", mutates_args=())
@without_autocast
def chunk_attention(
    q: Tensor, k: Tensor, v: Tensor, chunk: Tensor, found: Tensor, chunk_size: int, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Returns o (B, T, H, D) and the log-sum-exp of the scores (B, T, H), both float32 or better.

    A query with nothing found reads zeros, and its log-sum-exp is -inf. A chunk has a token that is seen.
    """
    o, lse = reads_like(q)
    groups, width = k.shape[2:]
    tiles, repeats = list(query_tiles(chunk)), q.shape[2] // groups
    most = max((chunk[:, tile].numel() for tile in tiles), default=0) + 1
    tops, totals = o.new_empty(most, repeats), o.new_zeros(most, repeats)
    values = o.new_zeros(most, repeats * width)  # of a pair that was not found it keeps something finite
    for tile in tiles:
        shape = (*chunk[:, tile].shape, repeats)
        pairs = math.prod(shape[:4])
        top, total, read = (x[: pairs + 1] for x in (tops.fill_(-torch.inf), totals, values))
        for block in blocks(q[:, tile], k, v, chunk[:, tile], found[:, tile], chunk_size, seen):
            scores = block.scores()
            highest = scores.amax(-1)
            scores.sub_(highest.unsqueeze(-1)).exp_()
            for store, x in ((top, highest), (total, scores.sum(-1)), (read, scores @ block.values)):
                store[block.pair] = x.view(len(block.pair), -1)
        top, total = (x[:pairs].view(shape) for x in (top, total))
        highest = top.amax(3)
        weight = (top - highest.clamp(min=torch.finfo(o.dtype).min).unsqueeze(3)).exp_()
        denominator = (weight * total).sum(3)
        read = (read[:pairs].view(*shape, width) * weight.unsqueeze(-1)).sum(3)
        o[:, tile] = (read / denominator.masked_fill(denominator == 0, 1).unsqueeze(-1)).flatten(2, 3)
        lse[:, tile] = (highest + denominator.log()).flatten(2)
    return o, lse


@torch.library.custom_op("mka::chunk_sums", mutates_args=())
@without_autocast
def chunk_sums(q: Tensor, k: Tensor, chunk: Tensor, found: Tensor, chunk_size: int, seen: Tensor | None) -> Tensor:
    """(B, T, G, K, R), float32 or better: the log-sum-exp of a query's scores in each chunk that was found, or -inf.

    It has no gradient: chunks are chosen by it.
    """
    sums = sums_like(q, chunk)
    for tile in query_tiles(chunk):
        store = sums.new_full((chunk[:, tile].numel() + 1, sums.shape[-1]), -torch.inf)
        for block in blocks(q[:, tile], k, None, chunk[:, tile], found[:, tile], chunk_size, seen):
            store[block.pair] = block.scores().logsumexp(-1).view(len(block.pair), -1)
        sums[:, tile] = store[:-1].view(sums[:, tile].shape)
    return sums


def sums_like(q: Tensor, chunk: Tensor) -> Tensor:
    return q.new_empty((*chunk.shape, q.shape[2] // chunk.shape[2]), dtype=wide(q.dtype))


@chunk_sums.register_fake
def _(q: Tensor, k: Tensor, chunk: Tensor, found: Tensor, chunk_size: int, seen: Tensor | None) -> Tensor:
    return sums_like(q, chunk)


@torch.library.custom_op("mka::chunk_attention_backward", mutates_args=())
@without_autocast
def chunk_attention_backward(
    grad: Tensor,
    grad_of_lse: Tensor | None,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk: Tensor,
    found: Tensor,
    chunk_size: int,
    seen: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v; the scores are computed anew."""
    dtype, top_k, (batch, slots, groups, width) = wide(q.dtype), chunk.shape[3], k.shape
    chunks = slots // chunk_size
    dq = q.new_empty(q.shape, dtype=dtype)
    dk, dv = (k.new_zeros(batch * groups * chunks, chunk_size * width, dtype=dtype) for _ in range(2))
    against = (grad * o).sum(-1)
    if grad_of_lse is not None:
        against -= grad_of_lse
    for tile in query_tiles(chunk):
        rows = chunk[:, tile].numel() // top_k
        given, sums, less = (x[:, tile].reshape(rows, -1) for x in (grad, lse, against))
        sums = pad(sums, (0, 0, 0, 1), value=torch.inf)  # an empty place has no weight
        parts = dq.new_zeros(rows * top_k + 1, dq.shape[2] // groups * width)
        for block in blocks(q[:, tile], k, v, chunk[:, tile], found[:, tile], chunk_size, seen):
            shape = (len(block.segment), -1)
            out = given[block.query].view(*shape, width)
            weight = block.scores()
            weight.sub_(sums[block.pair // top_k].view(*shape, 1)).exp_()
            dv.index_add_(0, block.segment, (weight.transpose(1, 2) @ out).view(shape))
            slope = out @ block.values.transpose(1, 2)
            slope.sub_(less[block.query].view(*shape, 1)).mul_(weight)
            dk.index_add_(0, block.segment, (slope.transpose(1, 2) @ block.queries).view(shape))
            parts[block.pair] = (slope @ block.keys).view(len(block.pair), -1)
        dq[:, tile] = parts[:-1].view(*chunk[:, tile].shape, -1).sum(3).view(dq[:, tile].shape)
    dk, dv = (x.view(batch, groups, chunks * chunk_size, width).transpose(1, 2) for x in (dk, dv))
    rest = (0, 0, 0, 0, 0, slots - chunks * chunk_size)
    dk, dv = (pad(x, rest).to(k.dtype).contiguous() for x in (dk, dv))
    return dq.div_(math.sqrt(width)).to(q.dtype), dk, dv


def reads_like(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape, dtype=wide(q.dtype)), q.new_empty(q.shape[:3], dtype=wide(q.dtype))


@chunk_attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, chunk: Tensor, found: Tensor, chunk_size: int, seen: Tensor | None
) -> tuple[Tensor, Tensor]:
    return reads_like(q)


@chunk_attention_backward.register_fake
def _(
    grad: Tensor,
    grad_of_lse: Tensor | None,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk: Tensor,
    found: Tensor,
    chunk_size: int,
    seen: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.chunk_size, ctx.seen = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *tensors)


def differentiate(ctx: Any, grad: Tensor | None, grad_of_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grad = torch.zeros_like(tensors[0]) if grad is None else grad.contiguous()
    grads = chunk_attention_backward(grad, grad_of_lse, *tensors, ctx.chunk_size, ctx.seen)
    return *grads, None, None, None, None


chunk_attention.register_autograd(differentiate, setup_context=keep)


def query_tiles(chunk: Tensor) -> Iterator[slice]:
    batch, tokens, groups, top_k = chunk.shape
    step = max(1, QUERY_PAIRS // (batch * groups * top_k))
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def blocks(
    q: Tensor, k: Tensor, v: Tensor | None, chunk: Tensor, found: Tensor, chunk_size: int, seen: Tensor | None
) -> Iterator[Blocks]:
    """The found pairs, sorted by row, group and chunk, in blocks of one chunk each."""
    slots, groups, width = k.shape[1:]
    chunks, top_k, dtype = slots // chunk_size, chunk.shape[3], wide(q.dtype)
    rows = q.reshape(-1, q.shape[2] // groups * width)  # one for each (b, t, g)
    k, v = k[:, : chunks * chunk_size], None if v is None else v[:, : chunks * chunk_size]
    k, v = k.unflatten(1, (chunks, chunk_size)), None if v is None else v.unflatten(1, (chunks, chunk_size))
    segments, pairs = sorted_pairs(chunk, found, chunks)
    for start in range(0, len(segments), BLOCKS):
        segment, pair = segments[start : start + BLOCKS], pairs[start : start + BLOCKS]
        row, group, j = segment // (groups * chunks), segment // chunks % groups, segment % chunks
        keys = k[row, j, :, group].to(dtype)
        values = keys if v is None else v[row, j, :, group].to(dtype)
        pair = pair.flatten()
        query = (pair // top_k).clamp(max=len(rows) - 1)
        queries = rows[query].to(dtype).mul_(1 / math.sqrt(width)).view(len(segment), -1, width)
        hidden = None if seen is None else ~seen[: chunks * chunk_size].view(chunks, 1, chunk_size)[j]
        yield Blocks(segment, pair, query, queries, keys, values, hidden)


def sorted_pairs(chunk: Tensor, found: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """`segment` (N,) and `pair` (N, P) of all blocks."""
    batch, _, groups, _ = chunk.shape
    first = torch.arange(0, batch * groups * chunks, chunks, device=chunk.device).view(batch, 1, groups, 1)
    pair = found.flatten().nonzero().squeeze(1)
    segment, order = (first + chunk).flatten()[pair].sort(stable=True)
    counts = torch.bincount(segment, minlength=batch * groups * chunks)
    blocks_of = (counts + BLOCK - 1) // BLOCK
    moved = (blocks_of.cumsum(0) - blocks_of) * BLOCK - (counts.cumsum(0) - counts)
    segments = torch.repeat_interleave(blocks_of)
    places = pair.new_full((len(segments) * BLOCK,), found.numel())
    places[torch.arange(len(pair), device=pair.device) + moved[segment]] = pair[order]
    return segments, places.view(-1, BLOCK)
