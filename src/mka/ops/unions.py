"""What queries read in the chunks they chose, a tile of neighbors at a time: all of
them multiply the chunks that any of them chose, under a mask.

    queries  q0: 2 0   q1: 0 1   q2: 2 0   q3: 1 2          tile of 4
    union    0 1 2                                          gathered once, for all heads of a group
    mask     q0: # . #   q1: # # .   q2: # . #   q3: . # #

In real text neighbors choose alike: the union of 32 queries has about 4 times the
chunks of one of them, and the fused kernel reads it in long products. Where their
choices differ, sorting by chunk is faster (`mka.ops.chunks`), and the functions here
return None.

Shapes: q (B, T, H, D), k and v (B, S, G, D), chunk and found (B, T, G, K), seen (S,)
bool; c = chunk_size, J = S // c, R = H / G. A tile is Q = QUERIES queries of one row
and group; N tiles are multiplied at once, and U is the size of their largest union.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from mka.ops.fused import attention_with_lse
from mka.ops.precision import wide

QUERIES = 32
"""Queries per tile."""
LARGEST_UNION = 6
"""Largest mean size of the unions, in multiples of K, at which reading together is
worthwhile."""
GATHERED = 2**22
"""Most numbers gathered at once, as keys (as many again as values) or as scores."""


class Tiles(NamedTuple):
    """The queries of a call in N tiles, ordered by row, then place in the row, then
    group."""

    chosen: Tensor
    """(N, Q, K): chunk numbers"""
    there: Tensor
    """(N, Q, K): True where a chunk was found"""
    present: Tensor
    """(N, J): True for the chunks in the union of a tile"""
    sizes: Tensor
    """(N,): chunks in each union"""
    per_row: int
    """Tiles per row and group"""
    groups: int
    """G"""

    def queries(self, q: Tensor) -> Tensor:
        """(B, T, H, D) -> (N, R, Q, D), zeros after the last query of a row."""
        q = pad(q, (0, 0, 0, 0, 0, self.per_row * QUERIES - q.shape[1]))
        tiles = q.view(len(q), self.per_row, QUERIES, self.groups, -1, q.shape[3])
        return tiles.permute(0, 1, 3, 4, 2, 5).flatten(0, 2)

    def back(self, parts: list[Tensor], tokens: int) -> Tensor:
        """Results (N, Q, ...) in the order of `gathered` -> (B, T, G, ...)."""
        # The tiles were gathered by the size of their unions; the second argsort
        # inverts that permutation.
        x = (
            torch.cat(parts)[self.sizes.argsort(stable=True).argsort()]
            .unflatten(0, (-1, self.per_row, self.groups))
            .transpose(2, 3)
            .flatten(1, 2)
        )
        return x[:, :tokens]


class Gathered(NamedTuple):
    """Some of the tiles, and the chunks that their queries read."""

    part: Tensor
    """(N,): indices of the tiles"""
    listed: Tensor
    """(N, U): the chunks of each union; arbitrary beyond its size"""
    column: Tensor
    """(N, Q, K): the column in `listed` of each chosen chunk; U where none was found"""
    at: tuple[Tensor | slice, ...]
    """Indices of (B, J, c, G, ...) that give (N, U, c, ...)"""


def tiles_of(chunk: Tensor, found: Tensor, chunks: int) -> Tiles | None:
    """The tiles of a call, from chunk and found (B, T, G, K) and the number of chunks
    J.

    None where neighbors choose too differently for this to pay.
    """
    tokens, groups, top_k = chunk.shape[1:]
    ahead = -tokens % QUERIES
    per_row = (tokens + ahead) // QUERIES
    chosen, there = (
        pad(x, (0, 0, 0, 0, 0, ahead))
        .view(len(x), per_row, QUERIES, groups, top_k)
        .permute(0, 1, 3, 2, 4)
        .reshape(-1, QUERIES, top_k)
        for x in (chunk, found)
    )
    # A mark for each chunk instead of a sort of Q K numbers; the extra column takes the
    # marks of what was not found, and is dropped.
    present = torch.zeros(len(chosen), chunks + 1, dtype=torch.bool, device=chunk.device)
    present.scatter_(1, chosen.masked_fill(~there, chunks).flatten(1), True)
    present = present[:, :chunks]
    sizes = present.sum(1)
    if not len(sizes) or int(sizes.sum()) > LARGEST_UNION * top_k * len(sizes):
        return None
    return Tiles(chosen, there, present, sizes, per_row, groups)


def gathered(tiles: Tiles, numbers: int) -> Iterator[Gathered]:
    """All tiles, a part at a time, so that at most about GATHERED numbers are gathered
    at once.

    `numbers` is how many are gathered per chunk of a union. Smaller unions come first:
    unions that are gathered together are padded to the largest of them.
    """
    count, chunks = tiles.present.shape
    device = tiles.present.device
    place, number = tiles.present.cumsum(1) - 1, torch.arange(count, device=device)
    row, group = number // (tiles.per_row * tiles.groups), number % tiles.groups
    step = max(1, GATHERED // max(1, int(tiles.sizes.max()) * numbers))
    for part in tiles.sizes.argsort(stable=True).split(step):
        union = max(1, int(tiles.sizes[part[-1]]))
        # Each chunk of a union is written to its column; those outside it, to an extra
        # column.
        listed = torch.zeros(len(part), union + 1, dtype=torch.long, device=device)
        every = torch.arange(chunks, device=device).expand(len(part), -1)
        listed.scatter_(1, place[part].where(tiles.present[part], union), every)
        listed = listed[:, :union]
        column = place[part].gather(1, tiles.chosen[part].flatten(1)).view_as(tiles.chosen[part])
        at = row[part, None], listed, slice(None), group[part, None]
        yield Gathered(part, listed, column.masked_fill(~tiles.there[part], union), at)


def attend_unions(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk: Tensor,
    found: Tensor,
    chunk_size: int,
    seen: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """Values (B, T, H, D) in q's dtype and log-sum-exps (B, T, H), equal to
    `chunk_attention`.

    Under autograd all that is gathered would be kept for the backward pass, so callers
    use it without gradients. None where neighbors choose too differently.
    """
    chunks, width = k.shape[1] // chunk_size, q.shape[3]
    if (tiles := tiles_of(chunk, found, chunks)) is None:
        return None
    queries = tiles.queries(q)
    keys, values = (x[:, : chunks * chunk_size].unflatten(1, (chunks, chunk_size)) for x in (k, v))
    outputs, sums = [], []
    for tile in gathered(tiles, chunk_size * width):
        count, union = tile.listed.shape
        # Column U, where nothing was found, is set and cut off: such a query sees
        # nothing.
        mask = torch.zeros(count, QUERIES, union + 1, dtype=torch.bool, device=q.device)
        mask = mask.scatter_(2, tile.column, True)[..., :union].repeat_interleave(chunk_size, dim=2)
        if seen is not None:
            mask &= seen_in(seen, tile.listed, chunk_size).flatten(1).unsqueeze(1)
        read = [x[tile.at].flatten(1, 2).unsqueeze(1).to(q.dtype) for x in (keys, values)]
        o, lse = attention_with_lse(
            queries[tile.part], *read, mask.unsqueeze(1), 1 / math.sqrt(width)
        )
        outputs.append(o)
        sums.append(lse)
    o, lse = (
        tiles.back([x.transpose(1, 2) for x in each], q.shape[1]).flatten(2, 3)
        for each in (outputs, sums)
    )
    return o, lse


def union_sums(
    q: Tensor, k: Tensor, chunk: Tensor, found: Tensor, chunk_size: int, seen: Tensor | None
) -> Tensor | None:
    """Log-sum-exps (B, T, G, K, R), float32 or better, equal to `chunk_sums`; no
    gradient.

    None where neighbors choose too differently.
    """
    chunks, width = k.shape[1] // chunk_size, q.shape[3]
    if (tiles := tiles_of(chunk, found, chunks)) is None:
        return None
    queries = tiles.queries(q)
    keys = k[:, : chunks * chunk_size].unflatten(1, (chunks, chunk_size))
    # The scores are computed in float32 although bfloat16 would be faster: which path
    # runs depends on how many tokens a call has, and with coarser sums on one of them
    # the chunks that a token chooses would too, and so would depend on later tokens.
    partly = torch.zeros(chunks, dtype=torch.bool, device=q.device)
    if seen is not None:
        seen = seen[: chunks * chunk_size].view(chunks, chunk_size)
        partly = ~seen.all(1)
    sums = []
    for tile in gathered(tiles, chunk_size * max(width, QUERIES * queries.shape[1])):
        count, union = tile.listed.shape
        asking = queries[tile.part].flatten(1, 2).to(wide(q.dtype))
        scores = asking @ keys[tile.at].flatten(1, 2).to(asking.dtype).mT  # (N, R Q, U c)
        # Of the U chunks a query needs the scores of the K that it chose: picking rows
        # of c numbers first leaves U / K times fewer exponentials than a log-sum-exp
        # over the whole union.
        own = torch.arange(0, scores.shape[1] * count * union, union, device=q.device)
        column = tile.column.clamp(max=union - 1).unsqueeze(1)
        own = own.view(count, -1, QUERIES, 1) + column  # (N, R, Q, K)
        mine = (
            scores.view(-1, chunk_size).index_select(0, own.flatten()).view(*own.shape, chunk_size)
        )
        mine = mine.mul_(1 / math.sqrt(width))
        chosen = tiles.chosen[tile.part]
        # Few chunks hold a token that is not read (the sinks): only their scores are
        # masked.
        if seen is not None:
            n, i, j = partly[chosen].nonzero().unbind(1)
            mine[n, :, i, j] = mine[n, :, i, j].masked_fill(
                ~seen[chosen[n, i, j]].unsqueeze(1), -torch.inf
            )
        mine = logsumexp_(mine).masked_fill_((tile.column == union).unsqueeze(1), -torch.inf)
        sums.append(mine.permute(0, 2, 3, 1))
    return tiles.back(sums, q.shape[1])


def logsumexp_(x: Tensor) -> Tensor:
    """The log-sum-exp over the last dimension; overwrites x."""
    highest = x.amax(-1)
    # With a maximum of -inf (nothing seen) x - max would be NaN; with 0 the result is
    # -inf.
    base = highest.masked_fill(highest.abs() == torch.inf, 0)
    return x.sub_(base.unsqueeze(-1)).exp_().sum(-1).log_().add_(base)


def seen_in(seen: Tensor, listed: Tensor, chunk_size: int) -> Tensor:
    """(N, U, c): which tokens of the chunks `listed` (N, U) may be read, from seen
    (S,)."""
    return seen[: len(seen) // chunk_size * chunk_size].view(-1, chunk_size)[listed]
