"""The chunks that a call can retrieve, wherever their tokens are kept, and what queries meet in them."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mka.memory.longterm import InTensor, attend_chunks, fetched, sums_in_chunks
from mka.memory.search import Limits, Retrieved, best_by_keys
from mka.memory.store import Records
from mka.ops.attend import Read, each, joined, nothing
from mka.ops.precision import wide

Turn = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Changes keys (N, c, D) of chunks before they are read, given their rows and numbers (N,)."""


class Chunks(NamedTuple):
    """The chunks of a call: tokens, in order or as they are stored; what they are found by, near and far; where they
    begin.

    keys, values (B, S, G, D) or records; means, far_means (B, J, G, D); places (B or 1, J), None: without positions;
    the first `banked` chunks are a bank's.
    """

    keys: Tensor | Records
    values: Tensor | Records
    means: Tensor
    far_means: Tensor | None = None
    places: Tensor | None = None
    banked: int = 0


class Meeting(NamedTuple):
    """What some of the chunks are to some of the queries: q (B, T, H, D) as they meet, and the keys turned or not."""

    q: Tensor
    retrieved: Retrieved
    turn: Turn | None = None


class Row(NamedTuple):
    """The queries of a tile and the records that they chose, as one long row with one key/value head.

    tensors (1, N c, 1, D) of each store; queries (1, B G t, H / G, D): neighbours stand side by side; chosen and seen
    fit them.
    """

    shape: tuple[int, int, int]
    """B, G, t"""
    queries: Tensor
    tensors: list[Tensor]
    chosen: Retrieved
    seen: Tensor | None

    def back(self, x: Tensor) -> Tensor:
        """(1, B G t, ...) -> (B, t, G, ...)"""
        return x.squeeze(0).unflatten(0, self.shape).transpose(1, 2)


def attend_held(meeting: Meeting, chunks: Chunks, chunk_size: int, sinks: int, *, lse: bool = False) -> Read:
    """`attend_chunks` of a meeting's queries, wherever the chunks are kept. Returns (B, T, H, D)."""
    q, retrieved, turn = meeting
    keys, values, banked = chunks.keys, chunks.values, chunks.banked
    if turn is None and isinstance(keys, Tensor) and isinstance(values, Tensor):
        return attend_chunks(q, keys, values, retrieved, chunk_size, sinks=sinks, lse=lse)
    reads = []
    for row in rows(meeting, (keys, values), chunk_size, sinks, banked):
        if not row.tensors[0].shape[1]:
            reads.append(nothing(q[:, : row.shape[2]], lse=lse))
            continue
        k, v = row.tensors
        read = attend_chunks(row.queries, k, v, row.chosen, chunk_size, row.seen, lse=lse)
        read = each(read, lambda x, row=row: row.back(x).flatten(2, 3))
        reads.append(read if lse else read._replace(lse=None))
    return joined(reads)


def sums_held(meeting: Meeting, chunks: Chunks, chunk_size: int, sinks: int) -> Tensor:
    """`sums_in_chunks` of a meeting's queries, wherever the chunks are kept. Returns (B, T, G, K, H / G)."""
    q, retrieved, turn = meeting
    keys, heads = chunks.keys, q.shape[2] // retrieved.chunk.shape[2]
    if turn is None and isinstance(keys, Tensor):
        return sums_in_chunks(q, keys, retrieved, chunk_size, sinks=sinks)
    sums = []
    for row in rows(meeting, (keys,), chunk_size, sinks, chunks.banked):
        batch, groups, tokens = row.shape
        if not row.tensors[0].shape[1]:
            shape = batch, tokens, groups, retrieved.chunk.shape[3], heads
            sums.append(q.new_full(shape, -torch.inf, dtype=wide(q.dtype)))
            continue
        found = sums_in_chunks(row.queries, row.tensors[0], row.chosen, chunk_size, row.seen)
        sums.append(row.back(found.squeeze(2)))
    return torch.cat(sums, dim=1)


def rerank(
    meetings: Sequence[Meeting], chunks: Chunks, proposed: Retrieved, window: Tensor, limits: Limits
) -> Retrieved:
    """The K of those `proposed` in which the heads would read most; `meetings` are theirs, window as `best_by_keys`
    takes it."""
    sums = [sums_held(meeting, chunks, limits.chunk_size, limits.sinks) for meeting in meetings]
    return best_by_keys(proposed, sums[0] if len(sums) == 1 else torch.maximum(*sums), window, limits.top_k)


def rows(
    meeting: Meeting, stores: tuple[Tensor | Records, ...], chunk_size: int, sinks: int, banked: int
) -> Iterator[Row]:
    """The queries in tiles; of the first store, keys, what `turn` makes of them. A row's first `sinks` tokens are not
    read; its chunks come after `banked` others."""
    q, retrieved, turn = meeting
    groups = retrieved.chunk.shape[2]
    records = tuple(InTensor(x, chunk_size) if isinstance(x, Tensor) else x for x in stores)
    for part in fetched(retrieved, records):
        tensors = [*part.records]
        if turn is not None and len(tensors[0]):
            tensors[0] = turn(tensors[0], part.row, part.chunk)
        seen = None
        if sinks:
            number = (part.chunk[:, None] - banked) * chunk_size + torch.arange(chunk_size, device=q.device)
            seen = ((number >= sinks) | (part.chunk[:, None] < banked)).flatten()
        queries = q[:, part.tile].unflatten(2, (groups, -1)).transpose(1, 2)
        shape = len(q), groups, queries.shape[2]
        chosen = Retrieved(*(x.transpose(1, 2).flatten(0, 2)[None, :, None] for x in part.retrieved))
        flat = [x.flatten(0, 1)[None, :, None] for x in tensors]
        yield Row(shape, queries.flatten(0, 2)[None], flat, chosen, seen)
