"""Attention of each query to the tokens of a few chunks of its own choice, chunk by
chunk.

    pairs (query, chunk) as chosen     sorted by chunk     blocks of P pairs with one chunk
    q0: 2 0   q1: 0 1   q2: 2 0        0: q0 q1 q2         0: q0 q1 | q2 -
    q3: 1 2                            1: q1 q3            1: q1 q3
                                       2: q0 q2 q3         2: q0 q2 | q3 -

A block is a dense product of its queries with the c keys of its chunk. Tiles are
stretches of queries whose pairs are sorted together.

What a query reads in its K chunks is merged by the log-sum-exps, as in MoBA (arXiv
2502.13189). The cost is K c keys per query, whatever S is, and a chunk is loaded once
for P of the queries that chose it.

Shapes: q (B, T, H, D), k and v (B, S, G, D), chunk and found (B, T, G, K), seen (S,)
bool, the tokens that may be read (None: all); c = chunk_size, J = S // c, R = H / G, P
= BLOCK.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from mka.ops.precision import wide, without_autocast

QUERY_PAIRS = 2**16
"""Most pairs that are sorted together, in one tile of queries: memory for intermediate
results does not grow with T."""
BLOCK = 16
"""Pairs per block."""
BLOCKS = 2**9
"""Blocks that are multiplied at once."""


class Blocks(NamedTuple):
    """N blocks that are multiplied at once, in float32 or better."""

    segment: Tensor
    """(N,): (row G + group) J + chunk"""
    pair: Tensor
    """(N P,): index into the tile's flattened (B, T, G, K); one past the last for an
    empty place"""
    query: Tensor
    """(N P,): pair // K, index into the tile's (B, T, G); arbitrary for an empty
    place"""
    queries: Tensor
    """(N, P R, D), scaled by 1 / sqrt(D)"""
    keys: Tensor
    """(N, c, D)"""
    values: Tensor
    """(N, c, D); the keys where no values were given"""
    hidden: Tensor | None
    """(N, 1, c): True for tokens that are not read; None: all are read"""

    def scores(self) -> Tensor:
        """(N, P R, c), -inf for hidden tokens."""
        scores = self.queries @ self.keys.transpose(1, 2)
        return scores if self.hidden is None else scores.masked_fill_(self.hidden, -torch.inf)


@torch.library.custom_op("mka::chunk_attention", mutates_args=())
@without_autocast
def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk: Tensor,
    found: Tensor,
    chunk_size: int,
    seen: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Returns o (B, T, H, D) and the log-sum-exp of the scores (B, T, H), both float32
    or better.

    A query with nothing found reads zeros, and its log-sum-exp is -inf. Every chunk
    that is found must have at least one token that is seen.
    """
    # For each pair a maximum, a sum of exponentials and a sum of values, each pair in a
    # place of its own; the last place takes what empty places of the blocks write. The
    # buffers are reused by all tiles. Only maxima are reset: a pair that was not found
    # then has weight 0, which cancels any finite leftovers.
    o, lse = reads_like(q)
    groups, width = k.shape[2:]
    tiles, repeats = list(query_tiles(chunk)), q.shape[2] // groups
    most = max((chunk[:, tile].numel() for tile in tiles), default=0) + 1
    tops, totals = o.new_empty(most, repeats), o.new_zeros(most, repeats)
    values = o.new_zeros(most, repeats * width)
    for tile in tiles:
        shape = (*chunk[:, tile].shape, repeats)
        pairs = math.prod(shape[:4])
        top, total, read = (x[: pairs + 1] for x in (tops.fill_(-torch.inf), totals, values))
        for block in blocks(q[:, tile], k, v, chunk[:, tile], found[:, tile], chunk_size, seen):
            scores = block.scores()
            highest = scores.amax(-1)
            scores.sub_(highest.unsqueeze(-1)).exp_()
            for store, x in (
                (top, highest),
                (total, scores.sum(-1)),
                (read, scores @ block.values),
            ):
                store[block.pair] = x.view(len(block.pair), -1)
        top, total = (x[:pairs].view(shape) for x in (top, total))
        # One softmax over the K chunks. The clamp is for queries that found nothing:
        # -inf - -inf would be NaN, -inf - finfo.min is -inf and its weight 0.
        highest = top.amax(3)
        weight = (top - highest.clamp(min=torch.finfo(o.dtype).min).unsqueeze(3)).exp_()
        denominator = (weight * total).sum(3)
        read = (read[:pairs].view(*shape, width) * weight.unsqueeze(-1)).sum(3)
        o[:, tile] = (read / denominator.masked_fill(denominator == 0, 1).unsqueeze(-1)).flatten(
            2, 3
        )
        lse[:, tile] = (highest + denominator.log()).flatten(2)
    return o, lse


@torch.library.custom_op("mka::chunk_sums", mutates_args=())
@without_autocast
def chunk_sums(
    q: Tensor, k: Tensor, chunk: Tensor, found: Tensor, chunk_size: int, seen: Tensor | None
) -> Tensor:
    """(B, T, G, K, R), float32 or better: the log-sum-exp of a query's scores in each
    chunk.

    It is -inf where no chunk was found. There is no gradient, since it only serves to
    choose.
    """
    sums = sums_like(q, chunk)
    for tile in query_tiles(chunk):
        store = sums.new_full((chunk[:, tile].numel() + 1, sums.shape[-1]), -torch.inf)
        for block in blocks(q[:, tile], k, None, chunk[:, tile], found[:, tile], chunk_size, seen):
            store[block.pair] = block.scores().logsumexp(-1).view(len(block.pair), -1)
        sums[:, tile] = store[:-1].view(sums[:, tile].shape)
    return sums


def sums_like(q: Tensor, chunk: Tensor) -> Tensor:
    """An uninitialized result of `chunk_sums`, (B, T, G, K, R)."""
    return q.new_empty((*chunk.shape, q.shape[2] // chunk.shape[2]), dtype=wide(q.dtype))


@chunk_sums.register_fake
def _(
    q: Tensor, k: Tensor, chunk: Tensor, found: Tensor, chunk_size: int, seen: Tensor | None
) -> Tensor:
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
    """The gradients of q, k and v; the scores are computed again, since storing them
    costs K c numbers per query and head."""
    dtype, top_k, (batch, slots, groups, width) = wide(q.dtype), chunk.shape[3], k.shape
    chunks = slots // chunk_size
    dq = q.new_empty(q.shape, dtype=dtype)
    dk, dv = (
        k.new_zeros(batch * groups * chunks, chunk_size * width, dtype=dtype) for _ in range(2)
    )
    # With p = softmax(s): ds = p (do v^T - delta), delta = do . o - dlse (see
    # mka.ops.fused).
    against = (grad * o).sum(-1)
    if grad_of_lse is not None:
        against -= grad_of_lse
    for tile in query_tiles(chunk):
        rows = chunk[:, tile].numel() // top_k
        given, sums, less = (x[:, tile].reshape(rows, -1) for x in (grad, lse, against))
        # An empty place's pair points one row past the last: exp(s - inf) = 0 there.
        sums = pad(sums, (0, 0, 0, 1), value=torch.inf)
        # Like the values forward: a place for each pair, summed over K at the end, so
        # that no two blocks write to the same query.
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
    # Tokens after the last whole chunk are never read, so their gradient is zero.
    rest = (0, 0, 0, 0, 0, slots - chunks * chunk_size)
    dk, dv = (pad(x, rest).to(k.dtype).contiguous() for x in (dk, dv))
    # dk was made with the scaled queries; only dq still lacks the scale of the scores.
    return dq.div_(math.sqrt(width)).to(q.dtype), dk, dv


def reads_like(q: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialized results of `chunk_attention`: (B, T, H, D) and (B, T, H)."""
    return q.new_empty(q.shape, dtype=wide(q.dtype)), q.new_empty(q.shape[:3], dtype=wide(q.dtype))


@chunk_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk: Tensor,
    found: Tensor,
    chunk_size: int,
    seen: Tensor | None,
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
    """Save for `differentiate` what it needs."""
    *tensors, ctx.chunk_size, ctx.seen = inputs
    # A log-sum-exp that nothing depends on gets None, which costs nothing, and not
    # zeros.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, *tensors)


def differentiate(
    ctx: Any, grad: Tensor | None, grad_of_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of the seven arguments of `chunk_attention`, from those of its two
    results."""
    tensors = ctx.saved_tensors
    grad = torch.zeros_like(tensors[0]) if grad is None else grad.contiguous()
    grads = chunk_attention_backward(grad, grad_of_lse, *tensors, ctx.chunk_size, ctx.seen)
    return *grads, None, None, None, None


chunk_attention.register_autograd(differentiate, setup_context=keep)


def query_tiles(chunk: Tensor) -> Iterator[slice]:
    """Slices along T of at most QUERY_PAIRS pairs each, over all rows and groups, but
    at least one query."""
    batch, tokens, groups, top_k = chunk.shape
    step = max(1, QUERY_PAIRS // (batch * groups * top_k))
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    chunk: Tensor,
    found: Tensor,
    chunk_size: int,
    seen: Tensor | None,
) -> Iterator[Blocks]:
    """The found pairs, sorted by row, group and chunk, in blocks of one chunk each; at
    most BLOCKS of them at once."""
    slots, groups, width = k.shape[1:]
    chunks, top_k, dtype = slots // chunk_size, chunk.shape[3], wide(q.dtype)
    rows = q.reshape(-1, q.shape[2] // groups * width)  # one for each (b, t, g)
    k, v = k[:, : chunks * chunk_size], None if v is None else v[:, : chunks * chunk_size]
    k, v = (
        k.unflatten(1, (chunks, chunk_size)),
        None if v is None else v.unflatten(1, (chunks, chunk_size)),
    )
    segments, pairs = sorted_pairs(chunk, found, chunks)
    for start in range(0, len(segments), BLOCKS):
        segment, pair = segments[start : start + BLOCKS], pairs[start : start + BLOCKS]
        row, group, j = segment // (groups * chunks), segment // chunks % groups, segment % chunks
        # Converted here, a few blocks at a time: a float32 copy of all keys would be
        # twice the size of a bfloat16 cache.
        keys = k[row, j, :, group].to(dtype)
        values = keys if v is None else v[row, j, :, group].to(dtype)
        pair = pair.flatten()
        # Empty places read the last query: any finite numbers do, as nobody reads their
        # result.
        query = (pair // top_k).clamp(max=len(rows) - 1)
        queries = rows[query].to(dtype).mul_(1 / math.sqrt(width)).view(len(segment), -1, width)
        hidden = (
            None if seen is None else ~seen[: chunks * chunk_size].view(chunks, 1, chunk_size)[j]
        )
        yield Blocks(segment, pair, query, queries, keys, values, hidden)


def sorted_pairs(chunk: Tensor, found: Tensor, chunks: int) -> tuple[Tensor, Tensor]:
    """`segment` (N,) and `pair` (N, P) of all blocks, as in `Blocks`."""
    batch, _, groups, _ = chunk.shape
    first = torch.arange(0, batch * groups * chunks, chunks, device=chunk.device).view(
        batch, 1, groups, 1
    )
    pair = found.flatten().nonzero().squeeze(1)
    # Stable, so that the queries of a chunk stay in their order and fill the same
    # blocks on every device.
    segment, order = (first + chunk).flatten()[pair].sort(stable=True)
    counts = torch.bincount(segment, minlength=batch * groups * chunks)
    blocks_of = (counts + BLOCK - 1) // BLOCK
    # How far the pairs of a segment move back when every segment before it is padded to
    # whole blocks.
    moved = (blocks_of.cumsum(0) - blocks_of) * BLOCK - (counts.cumsum(0) - counts)
    segments = torch.repeat_interleave(blocks_of)
    places = pair.new_full((len(segments) * BLOCK,), found.numel())
    places[torch.arange(len(pair), device=pair.device) + moved[segment]] = pair[order]
    return segments, places.view(-1, BLOCK)
