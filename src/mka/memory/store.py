"""Where entries that are read chunk by chunk are kept: on the device, in host memory,
or in a file.

    entry      0 1 2 3 | 4 5 6 7 | 8 9          one store per tensor, its entries in chunks of
                                                `block` entries
    record     (0, g)    (1, g)    (2, g)       the entries of group g in a chunk are contiguous:
                                                one read

A query reads few chunks of many: only the summaries that it is compared with stay on
the device.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from mka.errors import InputError
from mka.memory.entry import lasting


class RecordForm(NamedTuple):
    """The form of a record: `block` entries of one group, `width` numbers each."""

    groups: int
    """Records per chunk, one for each key/value head"""
    block: int
    """Entries per record"""
    width: int
    """Numbers per entry and group"""
    dtype: torch.dtype
    """Dtype of the numbers"""

    @classmethod
    def of(cls, shape: Sequence[int], block: int, dtype: torch.dtype) -> "RecordForm":
        """The form for entries of shape (G, D), or (C,), which is one group."""
        # All further dimensions of an entry are flattened to its width.
        groups = shape[0] if len(shape) > 1 else 1
        return cls(groups, block, prod(shape) // groups, dtype)

    @property
    def chunk_bytes(self) -> int:
        """Bytes per chunk, all groups together."""
        return self.groups * self.block * self.width * self.dtype.itemsize

    def chunks(self, entries: int) -> int:
        """How many chunks hold this many entries, the last one perhaps in part."""
        return -(-entries // self.block)


class Budget:
    """A limit, in bytes, that several stores share. Default: None, no limit."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit, self.used = limit, 0

    def take(self, size: int) -> None:
        """Count `size` more bytes. Raises InputError, and counts nothing, beyond the
        limit."""
        # A negative size gives bytes back, which is always allowed.
        if self.limit is not None and size > 0 and self.used + size > self.limit:
            raise InputError(
                f"longterm_gib is {self.limit / 2**30:g}; the long-term store holds "
                f"{self.used:,} bytes and needs {size:,} more; raise the limit, or read less"
            )
        self.used += size


class Records(ABC):
    """Something that records can be read from, by row, chunk and group."""

    form: RecordForm
    """The form of every record"""

    @abstractmethod
    def read(self, row: Tensor, chunk: Tensor, group: Tensor) -> Tensor:
        """The N records named by three (N,) tensors, as (N, block, width), on the
        device that keeps them or on the CPU."""


class Store(Records):
    """Records of `rows` rows that grow, within a budget that other stores may share."""

    def __init__(self, form: RecordForm, rows: int, budget: Budget) -> None:
        self.form, self.rows, self.budget, self.capacity = form, rows, budget, 0

    def reserve(self, entries: int) -> None:
        """Make room for `entries` entries in every row.

        Raises InputError if there is none: it fails here, before anything is written.
        """
        needed = self.form.chunks(entries)
        if needed <= self.capacity:
            return
        # The budget first: it refuses without side effects, and is given back if
        # growing fails.
        size = (needed - self.capacity) * self.rows * self.form.chunk_bytes
        self.budget.take(size)
        try:
            self._grow(needed)
        except InputError:
            self.budget.used -= size
            raise
        self.capacity = needed

    @abstractmethod
    def _grow(self, chunks: int) -> None:
        """Make room for `chunks` chunks in every row."""

    def release(self, entries: int) -> None:
        """Free the room beyond `entries` entries, reserved for tokens that did not
        come."""
        needed = self.form.chunks(entries)
        if needed < self.capacity:
            self._shrink(needed)
            self.budget.used -= (self.capacity - needed) * self.rows * self.form.chunk_bytes
            self.capacity = needed

    @abstractmethod
    def _shrink(self, chunks: int) -> None:
        """Free the room after the first `chunks` chunks."""

    @abstractmethod
    def write(self, row: int, start: int, values: Tensor) -> None:
        """Write values (N, groups, width) as entries start .. start + N of a row.

        There must be room for them (`reserve`).
        """

    def select(self, rows: Sequence[int]) -> None:
        """Keep the rows with these numbers, in this order; a row may be taken several
        times.

        Raises InputError if copies of rows would exceed the budget.
        """
        # Before anything moves: more rows may not fit, and fewer give their bytes back.
        self.budget.take((len(rows) - self.rows) * self.capacity * self.form.chunk_bytes)
        self._select(rows)
        self.rows = len(rows)

    @abstractmethod
    def _select(self, rows: Sequence[int]) -> None:
        """Rearrange the records as `select` says."""

    def __del__(self) -> None:
        # Other stores share the budget: what this one used is theirs again.
        self.budget.used -= self.rows * self.capacity * self.form.chunk_bytes

    @property
    @abstractmethod
    def allocated_nbytes(self) -> int:
        """Bytes that are allocated, spare room included."""

    def entries(self, row: int, start: int, count: int) -> Tensor:
        """The `count` consecutive entries of a row from `start` on, as (count, groups,
        width)."""
        # Whole records are read, (chunk, group, place), and reordered to (entry,
        # group).
        block, groups = self.form.block, self.form.groups
        first, last = start // block, self.form.chunks(start + count)
        chunk = torch.arange(first, last).repeat_interleave(groups)
        group = torch.arange(groups).repeat(last - first)
        found = self.read(torch.full_like(chunk, row), chunk, group).unflatten(
            0, (last - first, groups)
        )
        return found.transpose(1, 2).flatten(0, 1)[start - first * block :][:count]

    def spans(self, start: int, count: int) -> Iterator[tuple[int, slice, slice]]:
        """Entries start .. start + count, chunk by chunk: the number of the chunk, the
        places in it, and which of the entries, counted from `start`, go there."""
        # Only the first and the last chunk can be partial; each gets a slice of its
        # own.
        end = start + count
        while start < end:
            chunk, place = divmod(start, self.form.block)
            stop = min(end, (chunk + 1) * self.form.block)
            yield (
                chunk,
                slice(place, place + stop - start),
                slice(start - end + count, stop - end + count),
            )
            start = stop


class MemoryStore(Store):
    """Records in the memory of a device. Default device: the CPU."""

    def __init__(
        self, form: RecordForm, rows: int, budget: Budget, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__(form, rows, budget)
        # Nothing is allocated for rows that never complete a chunk.
        self.data = self._empty(0, device)

    def _empty(self, chunks: int, device: torch.device | str) -> Tensor:
        shape = (self.rows, chunks, self.form.groups, self.form.block, self.form.width)
        # Pinned, if there is a GPU to fetch from it.
        pinned = torch.device(device).type == "cpu" and torch.cuda.is_available()
        with lasting():
            return torch.empty(shape, dtype=self.form.dtype, device=device, pin_memory=pinned)

    def _grow(self, chunks: int) -> None:
        # An eighth ahead, so that not every chunk copies the store.
        if chunks > self.data.shape[1]:
            larger = self._empty(chunks + chunks // 8, self.data.device)
            larger[:, : self.data.shape[1]] = self.data
            self.data = larger

    def _shrink(self, chunks: int) -> None:
        """Nothing: what was allocated is kept for the next tokens."""

    def write(self, row: int, start: int, values: Tensor) -> None:
        """Write values (N, groups, width) as entries start .. start + N of a row."""
        block, count = self.form.block, len(values)
        values = values.to(self.data)
        # Entries up to the next chunk, then all whole chunks in one copy, then the
        # rest.
        ahead = min(count, -start % block)
        # A record is (group, block, width), entries come as (block, group, width):
        # hence transpose.
        whole = (count - ahead) // block
        middle = (
            values[ahead : ahead + whole * block].unflatten(0, (whole, block)).transpose(1, 2)
            if whole
            else None
        )
        first = (start + ahead) // block
        if middle is not None:
            self.data[row, first : first + whole] = middle
        for begin, end in ((0, ahead), (ahead + whole * block, count)):
            for chunk, places, which in self.spans(start + begin, end - begin):
                self.data[row, chunk, :, places] = values[begin:end][which].transpose(0, 1)

    def read(self, row: Tensor, chunk: Tensor, group: Tensor) -> Tensor:
        """The N records named by three (N,) tensors, (N, block, width), on the store's
        device."""
        row, chunk, group = (x.to(self.data.device) for x in (row, chunk, group))
        return self.data[row, chunk, group]

    def _select(self, rows: Sequence[int]) -> None:
        with lasting():
            self.data = self.data[list(rows)]

    @property
    def allocated_nbytes(self) -> int:
        """Bytes of the tensor, spare room included."""
        return self.data.numel() * self.data.element_size()
