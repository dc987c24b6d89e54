"""Padding, and documents packed in one row, handled once for every mechanism.

    row      a . b . . c d      valid = 1 0 1 0 0 1 1
    packed   a b c d 0 0 0      what the mechanism sees: its tokens first, in order, then zeros
    row      A 0 B 0 0 C D      the outputs back in their places

A causal mechanism cannot see what comes after a token, so in a packed row no valid
token meets padding at any level: window, averages, chunks and retrieval count valid
tokens and nothing else.

    row          a b c | d e | f g h i        three documents, positions 0 1 2 0 1 0 1 2 3
    rows         a b c   d e 0   f g h i      what the mechanism sees: one row per document, those
                                              of similar length in one call

No level knows that documents were packed, so none can mix them.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """How rows with padding become rows whose valid tokens come first, and back."""

    order: Tensor
    """(B, T): the column of the row that each packed column holds"""
    kept: Tensor
    """(B, T): True where a packed column holds a valid token"""

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (B, T, ...), valid tokens first, zeros after them."""
        packed = x.gather(1, self._index(x))
        # Zeros rather than whatever padding held: NaN there must not reach a product
        # with 0.
        return packed.masked_fill(~self._like(self.kept, x), 0)

    def unpack(self, y: Tensor) -> Tensor:
        """The inverse of `pack`; padding gives zeros."""
        y = y.masked_fill(~self._like(self.kept, y), 0)
        return torch.zeros_like(y).scatter(1, self._index(y), y)

    def _index(self, x: Tensor) -> Tensor:
        return self._like(self.order, x).expand_as(x)

    @staticmethod
    def _like(table: Tensor, x: Tensor) -> Tensor:
        return table.reshape(*table.shape, *[1] * (x.dim() - 2))


def packing(valid: Tensor) -> Packing:
    """The packing of rows whose valid tokens are marked in `valid` (B, T) bool."""
    # Stable, so that valid tokens keep their order; False sorts before True.
    order = torch.argsort(~valid, dim=1, stable=True)
    return Packing(order, valid.gather(1, order))


def documents_of(positions: Tensor, valid: Tensor | None = None) -> Tensor | None:
    """(B, T): the number of the document, within its row, that each token belongs to;
    None where every row is one document.

    A token begins a new document where its position (B or 1, T) is not above that of
    the valid token before it: positions start again. Positions of padding are ignored.
    """
    before = positions[:, :-1]
    # The running maximum of the valid columns is the latest valid token, so padding in
    # between is skipped; -1 where there is none yet, which every position exceeds.
    if valid is not None:
        positions = positions.expand(valid.shape)
        column = (
            torch.arange(valid.shape[1], device=valid.device)
            .where(valid, -1)
            .cummax(1)
            .values[:, :-1]
        )
        before = positions.gather(1, column.clamp(min=0)).masked_fill(column < 0, -1)
    begins = positions[:, 1:] <= before
    if valid is not None:
        begins &= valid[:, 1:]
    if not bool(begins.any()):
        return None
    return torch.nn.functional.pad(begins.cumsum(1), (1, 0))


class Pieces(NamedTuple):
    """N documents of similar length as rows."""

    where: Tensor
    """(N, L): the index of each token among all B T"""
    there: Tensor
    """(N, L): False after the end of a document"""


def pieces(documents: Tensor, valid: Tensor | None) -> Iterator[Pieces]:
    """The documents of all rows, given their numbers (B, T), in groups of similar
    length.

    The longest of a group, L, is less than twice as long as its shortest.
    """
    rows, tokens = documents.shape
    # One number for each document of the batch: those of different rows must not run
    # together.
    number = (
        documents + (documents.max() + 1) * torch.arange(rows, device=documents.device)[:, None]
    )
    where = torch.arange(rows * tokens, device=documents.device)
    number = number.flatten()
    if valid is not None:
        where = where[valid.flatten()]
        number = number[where]
    _, counts = number.unique_consecutive(return_counts=True)
    lengths = counts.tolist()
    starts = (counts.cumsum(0) - counts).tolist()
    # Lengths with the same number of bits differ by less than a factor of two: at most
    # half of a group is padding, and there are at most log2(T) calls.
    for power in sorted({length.bit_length() for length in lengths}):
        chosen = [n for n, length in enumerate(lengths) if length.bit_length() == power]
        longest = max(lengths[n] for n in chosen)
        place = torch.arange(longest, device=where.device)
        first, count = (
            torch.tensor([x[n] for n in chosen], device=where.device)[:, None]
            for x in (starts, lengths)
        )
        there = place < count
        yield Pieces(where[(first + place).clamp(max=len(where) - 1)], there)
