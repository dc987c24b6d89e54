"""The chunks that a call can retrieve, wherever their tokens are kept, and attention to
them."""

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
"""Rotates keys (N, c, D) of chunks before they are read, given the rows and the numbers
(N,) of the chunks."""


class Chunks(NamedTuple):
    """The J chunks of a call: their tokens, what they are found by, and where they
    begin."""

    keys: Tensor | Records
    """(B, S, G, D) in order, or the records that keep them"""
    values: Tensor | Records
    """The same for values"""
    means: Tensor
    """(B, J, G, D): mean keys, which chunks are found by"""
    far_means: Tensor | None = None
    """(B, J, G, D): mean keys as if each chunk began at position 0, for distant
    queries"""
    places: Tensor | None = None
    """(B or 1, J): position of the first token; None: without positions"""
    banked: int = 0
    """How many of the chunks, in front, belong to a bank"""


class Meeting(NamedTuple):
    """Queries, and the chunks that they meet in one way: as near, or as beyond
    max_distance."""

    q: Tensor
    """(B, T, H, D), rotated for this meeting"""
    retrieved: Retrieved
    """The chunks that are met"""
    turn: Turn | None = None
    """How the keys are rotated for it; None: they are read as they are kept"""


class Row(NamedTuple):
    """The queries of a tile and the N records that they chose, as one long row with one
    key/value head."""

    shape: tuple[int, int, int]
    """(B, G, t)"""
    queries: Tensor
    """(1, B G t, H / G, D): neighbors in the text are neighbors in the row"""
    tensors: list[Tensor]
    """(1, N c, 1, D) from each store"""
    chosen: Retrieved
    """(1, B G t, 1, K), an index into the N records"""
    seen: Tensor | None
    """(N c,): the tokens that may be read; None: all"""

    def back(self, x: Tensor) -> Tensor:
        """Results (1, B G t, ...) of the row -> (B, t, G, ...)."""
        return x.squeeze(0).unflatten(0, self.shape).transpose(1, 2)


def attend_held(
    meeting: Meeting, chunks: Chunks, chunk_size: int, sinks: int, *, lse: bool = False
) -> Read:
    """`attend_chunks` for the queries of a meeting, wherever the chunks are kept.

    The row's first `sinks` tokens are not read. Returns a read of (B, T, H, D).
    """
    q, retrieved, turn = meeting
    # Tensors that are read as they are need no fetching.
    keys, values, banked = chunks.keys, chunks.values, chunks.banked
    if turn is None and isinstance(keys, Tensor) and isinstance(values, Tensor):
        return attend_chunks(q, keys, values, retrieved, chunk_size, sinks=sinks, lse=lse)
    reads = []
    for row in rows(meeting, (keys, values), chunk_size, sinks, banked):
        # No query of the tile found anything, so no record was fetched.
        if not row.tensors[0].shape[1]:
            reads.append(nothing(q[:, : row.shape[2]], lse=lse))
            continue
        k, v = row.tensors
        # `row=row` binds this turn's row: the lambda must not see a later one.
        read = attend_chunks(row.queries, k, v, row.chosen, chunk_size, row.seen, lse=lse)
        read = each(read, lambda x, row=row: row.back(x).flatten(2, 3))
        reads.append(read if lse else read._replace(lse=None))
    return joined(reads)


def sums_held(meeting: Meeting, chunks: Chunks, chunk_size: int, sinks: int) -> Tensor:
    """`sums_in_chunks` for the queries of a meeting, wherever the chunks are kept: (B,
    T, G, K, H / G)."""
    q, retrieved, turn = meeting
    keys, heads = chunks.keys, q.shape[2] // retrieved.chunk.shape[2]
    if turn is None and isinstance(keys, Tensor):
        return sums_in_chunks(q, keys, retrieved, chunk_size, sinks=sinks)
    # Keys alone: the values of chunks that are not chosen are never fetched.
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
    """The K of the `proposed` chunks of which a group's heads would read most, by all
    their keys.

    meetings: one or two ways in which queries meet them; window (B, T, H): see
        `best_by_keys`.
    """
    # Each chunk is met in one way only, and has a sum of -inf in the other: the maximum
    # joins them.
    sums = [sums_held(meeting, chunks, limits.chunk_size, limits.sinks) for meeting in meetings]
    return best_by_keys(
        proposed, sums[0] if len(sums) == 1 else torch.maximum(*sums), window, limits.top_k
    )


def rows(
    meeting: Meeting, stores: tuple[Tensor | Records, ...], chunk_size: int, sinks: int, banked: int
) -> Iterator[Row]:
    """The queries of a meeting in tiles, with the records that they chose from the
    stores.

    The first store holds keys, which are rotated by the meeting's `turn`. The first
    `sinks` tokens of a row, whose chunks come after `banked` others, are marked as not
    read.
    """
    q, retrieved, turn = meeting
    groups = retrieved.chunk.shape[2]
    records = tuple(InTensor(x, chunk_size) if isinstance(x, Tensor) else x for x in stores)
    for part in fetched(retrieved, records):
        # Keys are rotated after fetching: only those that are read, each once per tile.
        tensors = [*part.records]
        if turn is not None and len(tensors[0]):
            tensors[0] = turn(tensors[0], part.row, part.chunk)
        # Token numbers within the row: negative in a bank's chunks, which have no
        # sinks.
        seen = None
        if sinks:
            number = (part.chunk[:, None] - banked) * chunk_size + torch.arange(
                chunk_size, device=q.device
            )
            seen = ((number >= sinks) | (part.chunk[:, None] < banked)).flatten()
        queries = q[:, part.tile].unflatten(2, (groups, -1)).transpose(1, 2)
        shape = len(q), groups, queries.shape[2]
        # Records are per group already, so groups become rows of queries, in the order
        # B, G, t.
        chosen = Retrieved(
            *(x.transpose(1, 2).flatten(0, 2)[None, :, None] for x in part.retrieved)
        )
        flat = [x.flatten(0, 1)[None, :, None] for x in tensors]
        yield Row(shape, queries.flatten(0, 2)[None], flat, chosen, seen)
