"""What queries read in the chunks they chose, a few neighbours at a time: all multiply what any of them chose, masked.

    queries  q0: 2 0   q1: 0 1   q2: 2 0   q3: 1 2          tile of 4
    union    0 1 2                                            gathered once, for all heads of the group
    mask     q0: # . #   q1: # # .   q2: # . #   q3: . # #

Neighbours choose alike where text is read: 32 of them together about 4 times what one of them does, read in long
products by the fused kernel. Where they do not, sorting by chunk is faster (`mka.ops.chunks`), and the caller is told.

Shapes: q (B, T, H, D), k and v (B, S, G, D), chunk and found (B, T, G, K), seen (S,); c = chunk_size, J = S // c,
R = H / G. A tile is Q queries of one row and group; N tiles are multiplied at once, U is their largest union.
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
"""Neighbours that read together."""
LARGEST_UNION = 6
"""Chunks of a union for each that a query chose, up to which that is worth while."""
GATHERED = 2**22
"""Numbers of keys gathered at once."""


class Tiles(NamedTuple):
    """The queries of a call in tiles: N of them for every row, tile and group, in that order."""

    chosen: Tensor
    """(N, Q, K)"""
    there: Tensor
    """(N, Q, K): what was found"""
    present: Tensor
    """(N, J): the unions"""
    sizes: Tensor
    """(N,)"""
    per_row: int
    """Tiles of a row and group"""
    groups: int

    def queries(self, q: Tensor) -> Tensor:
        """(N, R, Q, D)"""
        q = pad(q, (0, 0, 0, 0, 0, self.per_row * QUERIES - q.shape[1]))
        tiles = q.view(len(q), self.per_row, QUERIES, self.groups, -1, q.shape[3])
        return tiles.permute(0, 1, 3, 4, 2, 5).flatten(0, 2)

    def back(self, parts: list[Tensor], tokens: int) -> Tensor:
        """(N, Q, ...) of tiles in the order in which they are gathered -> (B, T, G, ...)"""
        x = (
            torch.cat(parts)[self.sizes.argsort(stable=True).argsort()]
            .unflatten(0, (-1, self.per_row, self.groups))
            .transpose(2, 3)
            .flatten(1, 2)
        )
        return x[:, :tokens]


class Gathered(NamedTuple):
    """Some of the tiles, and what their queries read."""

    part: Tensor
    """(N,): which ones"""
    listed: Tensor
    """(N, U): the chunks of each union; beyond its size, any"""
    column: Tensor
    """(N, Q, K): where a chosen chunk stands among them; U where none was found"""
    at: tuple[Tensor | slice, ...]
    """Indices of (B, J, c, G, ...) that give (N, U, c, ...)"""


def tiles_of(chunk: Tensor, found: Tensor, chunks: int) -> Tiles | None:
    """None: neighbours choose too differently."""
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
    present = torch.zeros(len(chosen), chunks + 1, dtype=torch.bool, device=chunk.device)
    present.scatter_(1, chosen.masked_fill(~there, chunks).flatten(1), True)
    present = present[:, :chunks]
    sizes = present.sum(1)
    if not len(sizes) or int(sizes.sum()) > LARGEST_UNION * top_k * len(sizes):
        return None
    return Tiles(chosen, there, present, sizes, per_row, groups)


def gathered(tiles: Tiles, numbers: int) -> Iterator[Gathered]:
    """All tiles, so many at once that a few million numbers are gathered, of each chunk `numbers`; the smaller unions
    first, because those that are gathered together are padded to the largest."""
    count, chunks = tiles.present.shape
    device = tiles.present.device
    place, number = tiles.present.cumsum(1) - 1, torch.arange(count, device=device)
    row, group = number // (tiles.per_row * tiles.groups), number % tiles.groups
    step = max(1, GATHERED // max(1, int(tiles.sizes.max()) * numbers))
    for part in tiles.sizes.argsort(stable=True).split(step):
        union = max(1, int(tiles.sizes[part[-1]]))
        listed = torch.zeros(len(part), union + 1, dtype=torch.long, device=device)
        every = torch.arange(chunks, device=device).expand(len(part), -1)
        listed.scatter_(1, place[part].where(tiles.present[part], union), every)
        listed = listed[:, :union]
        column = place[part].gather(1, tiles.chosen[part].flatten(1)).view_as(tiles.chosen[part])
        at = row[part, None], listed, slice(None), group[part, None]
        yield Gathered(part, listed, column.masked_fill(~tiles.there[part], union), at)


def attend_unions(
    q: Tensor, k: Tensor, v: Tensor, chunk: Tensor, found: Tensor, chunk_size: int, seen: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Values (B, T, H, D) in q's dtype and log-sum-exps (B, T, H), as `chunk_attention` gives them; it keeps what it
    gathers for a backward pass. None: neighbours choose too differently."""
    chunks, width = k.shape[1] // chunk_size, q.shape[3]
    if (tiles := tiles_of(chunk, found, chunks)) is None:
        return None
    queries = tiles.queries(q)
    keys, values = (x[:, : chunks * chunk_size].unflatten(1, (chunks, chunk_size)) for x in (k, v))
    outputs, sums = [], []
    for tile in gathered(tiles, chunk_size * width):
        count, union = tile.listed.shape
        mask = torch.zeros(count, QUERIES, union + 1, dtype=torch.bool, device=q.device)
        mask = mask.scatter_(2, tile.column, True)[..., :union].repeat_interleave(chunk_size, dim=2)
        if seen is not None:
            mask &= seen_in(seen, tile.listed, chunk_size).flatten(1).unsqueeze(1)
        read = [x[tile.at].flatten(1, 2).unsqueeze(1).to(q.dtype) for x in (keys, values)]
        o, lse = attention_with_lse(queries[tile.part], *read, mask.unsqueeze(1), 1 / math.sqrt(width))
        outputs.append(o)
        sums.append(lse)
    o, lse = (tiles.back([x.transpose(1, 2) for x in each], q.shape[1]).flatten(2, 3) for each in (outputs, sums))
    return o, lse


def union_sums(
    q: Tensor, k: Tensor, chunk: Tensor, found: Tensor, chunk_size: int, seen: Tensor | None
) -> Tensor | None:
    """(B, T, G, K, R), float32 or better, as `chunk_sums` gives them. None: neighbours choose too differently."""
    chunks, width = k.shape[1] // chunk_size, q.shape[3]
    if (tiles := tiles_of(chunk, found, chunks)) is None:
        return None
    queries = tiles.queries(q)
    keys = k[:, : chunks * chunk_size].unflatten(1, (chunks, chunk_size))
    # Not in bfloat16, which is faster: what is chosen would depend on the way, and so on later tokens.
    partly = torch.zeros(chunks, dtype=torch.bool, device=q.device)
    if seen is not None:
        seen = seen[: chunks * chunk_size].view(chunks, chunk_size)
        partly = ~seen.all(1)
    sums = []
    for tile in gathered(tiles, chunk_size * max(width, QUERIES * queries.shape[1])):
        count, union = tile.listed.shape
        asking = queries[tile.part].flatten(1, 2).to(wide(q.dtype))
        scores = asking @ keys[tile.at].flatten(1, 2).to(asking.dtype).mT  # (N, R Q, U c)
        own = torch.arange(0, scores.shape[1] * count * union, union, device=q.device)
        own = own.view(count, -1, QUERIES, 1) + tile.column.clamp(max=union - 1).unsqueeze(1)  # (N, R, Q, K)
        mine = scores.view(-1, chunk_size).index_select(0, own.flatten()).view(*own.shape, chunk_size)
        mine = mine.mul_(1 / math.sqrt(width))
        chosen = tiles.chosen[tile.part]
        if seen is not None:
            n, i, j = partly[chosen].nonzero().unbind(1)
            mine[n, :, i, j] = mine[n, :, i, j].masked_fill(~seen[chosen[n, i, j]].unsqueeze(1), -torch.inf)
        mine = logsumexp_(mine).masked_fill_((tile.column == union).unsqueeze(1), -torch.inf)
        sums.append(mine.permute(0, 2, 3, 1))
    return tiles.back(sums, q.shape[1])


def logsumexp_(x: Tensor) -> Tensor:
    """Over the last dimension; x is written over."""
    highest = x.amax(-1)
    base = highest.masked_fill(highest.abs() == torch.inf, 0)
    return x.sub_(base.unsqueeze(-1)).exp_().sum(-1).log_().add_(base)


def seen_in(seen: Tensor, listed: Tensor, chunk_size: int) -> Tensor:
    """(N, U, c): which tokens of the chunks listed (N, U) are read at all."""
    return seen[: len(seen) // chunk_size * chunk_size].view(-1, chunk_size)[listed]
