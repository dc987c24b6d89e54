"""The form of one store of a state, and how its entries lie in memory."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Entry:
    """The form of one store of a state.

    Args:
        shape: shape of one entry, such as (G, D) or (C,).
        dtype: dtype of the entries.
        every: tokens per entry. Default: 1.
        latest: how many of the newest entries are read; they are kept in a ring.
            Default: None, all of them, in a store that grows.
        first: how many of a row's first entries are read in addition, however long the
            row is (attention sinks). Default: 0.
        block: how many consecutive entries are read together, as a record; such a store
            may be kept outside the device (mka.memory.store). Default: None, the store
            is one tensor.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    every: int = 1
    latest: int | None = None
    first: int = 0
    block: int | None = None

    def limit(self, reversible: int) -> int | None:
        """Entries in the ring, with those that taking back `reversible` tokens needs;
        None: all."""
        # Minus a floor of the negative: reversible / every, rounded up.
        return None if self.latest is None else self.latest - (-reversible // self.every)

    def place(self, number: Tensor, limit: int | None) -> Tensor:
        """The places of the entries with these numbers, in a ring of `limit` places
        (None: no ring) that follows the first entries."""
        if limit is None:
            return number
        if not self.first:
            return number % limit
        return torch.where(number < self.first, number, self.first + (number - self.first) % limit)

    def number_at(self, place: Tensor, count: Tensor, limit: int) -> Tensor:
        """The inverse of `place` in rows with `count` entries; negative where a place
        is empty."""
        # The newest entry with this place: counting back from count - 1, the first one
        # that is congruent to it.
        number = count - 1 - (count - 1 - place) % limit
        if not self.first:
            return number
        number = number.where(number >= self.first, -1)
        return torch.where(place < self.first, place.where(place < count, -1), number)

    def nbytes(self, num_tokens: int, reversible: int) -> int:
        """Bytes of the entries that are held of one row of `num_tokens` tokens."""
        entries, limit = num_tokens // self.every, self.limit(reversible)
        return (
            (entries if limit is None else min(entries, self.first + limit))
            * prod(self.shape)
            * self.dtype.itemsize
        )


def lasting() -> AbstractContextManager[Any]:
    """Within the block, tensors are made that can be written to in every mode later.

    A tensor made under `torch.inference_mode` can only be written to there, but a cache
    may be filled in one mode and used in another.
    """
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def store(
    rows: int,
    places: int,
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device | str | None = None,
) -> Tensor:
    """Zeros of (rows, places, *shape).

    For entries with heads, (G, D), the memory is ordered (B, G, S, D), as attention
    reads it.
    """
    # Zeros rather than empty: places that are not written yet are read under a mask,
    # and 0 * NaN would be NaN.
    with lasting():
        if len(shape) < 2:
            return torch.zeros(rows, places, *shape, dtype=dtype, device=device)
        by_head = torch.zeros(rows, shape[0], places, *shape[1:], dtype=dtype, device=device)
        return by_head.transpose(1, 2)


def runs(entry: Entry, begin: int, end: int, limit: int | None) -> Iterator[tuple[int, int, int]]:
    """The entries begin .. end in pieces that are contiguous in memory: (begin, end,
    place) each.

    Entries that later ones of the same call would overwrite are left out.
    """
    if limit is None:
        yield begin, end, begin
        return
    if begin < min(end, entry.first):
        yield begin, min(end, entry.first), begin
    # Only the last `limit` entries survive in the ring, and a piece ends where the ring
    # wraps.
    begin = max(begin, entry.first, end - limit)
    while begin < end:
        place = (begin - entry.first) % limit
        stop = min(end, begin + limit - place)
        yield begin, stop, entry.first + place
        begin = stop
