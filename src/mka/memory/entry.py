"""The form of one store of a state, and how its entries lie in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor


@dataclass(frozen=True)
class Entry:
    """The form of one store: an entry of `shape` for every `every` tokens, the `latest` of which are read.

    `block`: entries that are read together, by number; such a store may lie elsewhere (mka.memory.store).
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    every: int = 1
    latest: int | None = None
    block: int | None = None

    def limit(self, reversible: int) -> int | None:
        """Entries that are kept, those that taking back `reversible` tokens needs included."""
        return None if self.latest is None else self.latest - (-reversible // self.every)

    def nbytes(self, num_tokens: int, reversible: int) -> int:
        """Bytes of the entries held of one row of `num_tokens` tokens."""
        entries, limit = num_tokens // self.every, self.limit(reversible)
        return (entries if limit is None else min(entries, limit)) * prod(self.shape) * self.dtype.itemsize


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


def runs(begin: int, end: int, limit: int | None) -> Iterator[tuple[int, int]]:
    """The entries [begin, end) in pieces that lie side by side in a ring of `limit` places."""
    while begin < end:
        stop = end if limit is None else min(end, begin - begin % limit + limit)
        yield begin, stop
        begin = stop
