"""The form of one store of a state, and how its entries lie in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Entry:
    """The form of one store: an entry of `shape` for every `every` tokens, the `latest` of which are read.

    `first`: so many of a row's first entries are read besides, however long it is (attention sinks).
    `block`: entries that are read together, by number; such a store may lie elsewhere (mka.memory.store).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    every: int = 1
    latest: int | None = None
    first: int = 0
    block: int | None = None

    def limit(self, reversible: int) -> int | None:
        """Entries that are kept after the first, those that taking back `reversible` tokens needs included."""
        return None if self.latest is None else self.latest - (-reversible // self.every)

    def place(self, number: Tensor, limit: int | None) -> Tensor:
        """Where the entries of these numbers stand, in a ring of `limit` places after the first."""
        if limit is None:
            return number
        if not self.first:
            return number % limit
        return torch.where(number < self.first, number, self.first + (number - self.first) % limit)

    def number_at(self, place: Tensor, count: Tensor, limit: int) -> Tensor:
        """The inverse, of rows with `count` entries; negative where a place is empty."""
        number = count - 1 - (count - 1 - place) % limit
        if not self.first:
            return number
        number = number.where(number >= self.first, -1)
        return torch.where(place < self.first, place.where(place < count, -1), number)

    def nbytes(self, num_tokens: int, reversible: int) -> int:
        """Bytes of the entries held of one row of `num_tokens` tokens."""
        entries, limit = num_tokens // self.every, self.limit(reversible)
        return (entries if limit is None else min(entries, self.first + limit)) * prod(self.shape) * self.dtype.itemsize


def store(
    rows: int,
    places: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> Tensor:
    """(B, S, ...) zeros; of heads (B, S, G, D) each lies by itself in memory, as attention reads them."""
    if len(shape) < 2:
        return torch.zeros(rows, places, *shape, dtype=dtype, device=device)
    return torch.zeros(rows, shape[0], places, *shape[1:], dtype=dtype, device=device).transpose(1, 2)


def runs(entry: Entry, begin: int, end: int, limit: int | None) -> Iterator[tuple[int, int, int]]:
    """The entries [begin, end) in pieces that lie side by side, less those written over: begin, end and place."""
    if limit is None:
        yield begin, end, begin
        return
    if begin < min(end, entry.first):
        yield begin, min(end, entry.first), begin
    begin = max(begin, entry.first, end - limit)
    while begin < end:
        place = (begin - entry.first) % limit
        stop = min(end, begin + limit - place)
        yield begin, stop, entry.first + place
        begin = stop
