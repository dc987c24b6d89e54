"""Where what is read by the chunk is kept: on the device, in host memory, or in a file.

    entry      0 1 2 3 | 4 5 6 7 | 8 9          one store for each tensor of a row, its entries in chunks of `block`
    record     (0, g)    (1, g)    (2, g)       block entries of group g side by side: one read, whatever the length

A query names few chunks of many: what stays on the device are the summaries it is compared with. The file has no name:
it is removed as soon as it is opened, so a killed process leaves nothing, and nobody else can write to it or cut it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from mka.limits import InputError


class RecordForm(NamedTuple):
    """A record: `block` entries of `width` numbers, one record for each of `groups` in a chunk."""

    groups: int
    block: int
    width: int
    dtype: torch.dtype

    @classmethod
    def of(cls, shape: Sequence[int], block: int, dtype: torch.dtype) -> "RecordForm":
        """Entries of (G, D), or of (C,), which is one group."""
        groups = shape[0] if len(shape) > 1 else 1
        return cls(groups, block, prod(shape) // groups, dtype)

    @property
    def chunk_bytes(self) -> int:
        return self.groups * self.block * self.width * self.dtype.itemsize

    def chunks(self, entries: int) -> int:
        return -(-entries // self.block)


class Budget:
    """Bytes that stores may take together; None: as many as there are."""

    def __init__(self, limit: int | None = None) -> None:
        self.limit, self.used = limit, 0

    def take(self, size: int) -> None:
        """Raises InputError, and takes nothing, beyond the limit."""
        if self.limit is not None and size > 0 and self.used + size > self.limit:
            raise InputError(
                f"longterm_gib is {self.limit / 2**30:g}; the long-term store holds {self.used:,} bytes and needs "
                f"{size:,} more; allow more, or read less"
            )
        self.used += size


class Records(ABC):
    """What can be read: record (row, chunk, group) as (block, width)."""

    form: RecordForm

    @abstractmethod
    def read(self, row: Tensor, chunk: Tensor, group: Tensor) -> Tensor:
        """(N, block, width) of the N records named, on the CPU or on the device they are kept on."""


class Store(Records):
    """Records that grow, row by row."""

    def __init__(self, form: RecordForm, rows: int, budget: Budget) -> None:
        self.form, self.rows, self.budget, self.capacity = form, rows, budget, 0

    def reserve(self, entries: int) -> None:
        """Make room for so many entries in every row; what goes wrong goes wrong here, before anything is written."""
        needed = self.form.chunks(entries)
        if needed <= self.capacity:
            return
        size = (needed - self.capacity) * self.rows * self.form.chunk_bytes
        self.budget.take(size)
        try:
            self._grow(needed)
        except InputError:
            self.budget.used -= size
            raise
        self.capacity = needed

    @abstractmethod
    def _grow(self, chunks: int) -> None: ...

    def release(self, entries: int) -> None:
        """Give back the room beyond so many entries, which were reserved and are not going to be written."""
        needed = self.form.chunks(entries)
        if needed < self.capacity:
            self._shrink(needed)
            self.budget.used -= (self.capacity - needed) * self.rows * self.form.chunk_bytes
            self.capacity = needed

    @abstractmethod
    def _shrink(self, chunks: int) -> None: ...

    @abstractmethod
    def write(self, row: int, start: int, values: Tensor) -> None:
        """values (N, groups, width): entries start .. start + N of the row; there must be room."""

    def select(self, rows: Sequence[int]) -> None:
        """The rows of these numbers, in this order; a row may be taken several times."""
        self.budget.take((len(rows) - self.rows) * self.capacity * self.form.chunk_bytes)
        self._select(rows)
        self.rows = len(rows)

    @abstractmethod
    def _select(self, rows: Sequence[int]) -> None: ...

    def __del__(self) -> None:
        self.budget.used -= self.rows * self.capacity * self.form.chunk_bytes

    @property
    @abstractmethod
    def allocated_nbytes(self) -> int: ...

    def entries(self, row: int, start: int, count: int) -> Tensor:
        """(N, groups, width): consecutive entries of a row."""
        block, groups = self.form.block, self.form.groups
        first, last = start // block, self.form.chunks(start + count)
        chunk = torch.arange(first, last).repeat_interleave(groups)
        group = torch.arange(groups).repeat(last - first)
        found = self.read(torch.full_like(chunk, row), chunk, group).unflatten(0, (last - first, groups))
        return found.transpose(1, 2).flatten(0, 1)[start - first * block :][:count]

    def spans(self, start: int, count: int) -> Iterator[tuple[int, slice, slice]]:
        """Entries start .. start + count by chunk: its number, its places, and which of the entries they are."""
        end = start + count
        while start < end:
            chunk, place = divmod(start, self.form.block)
            stop = min(end, (chunk + 1) * self.form.block)
            yield chunk, slice(place, place + stop - start), slice(start - end + count, stop - end + count)
            start = stop


class MemoryStore(Store):
    """In the memory of a device; pinned where a GPU fetches from it."""

    def __init__(self, form: RecordForm, rows: int, budget: Budget, device: torch.device | str = "cpu") -> None:
        super().__init__(form, rows, budget)
        self.data = self._empty(0, device)

    def _empty(self, chunks: int, device: torch.device | str) -> Tensor:
        shape = (self.rows, chunks, self.form.groups, self.form.block, self.form.width)
        pinned = torch.device(device).type == "cpu" and torch.cuda.is_available()
        return torch.empty(shape, dtype=self.form.dtype, device=device, pin_memory=pinned)

    def _grow(self, chunks: int) -> None:
        if chunks > self.data.shape[1]:
            larger = self._empty(chunks + chunks // 8, self.data.device)
            larger[:, : self.data.shape[1]] = self.data
            self.data = larger

    def _shrink(self, chunks: int) -> None:
        """What was allocated stays, for the next time."""

    def write(self, row: int, start: int, values: Tensor) -> None:
        block, count = self.form.block, len(values)
        values = values.to(self.data)
        ahead = min(count, -start % block)  # up to the next chunk; then whole chunks at once, then the rest
        whole = (count - ahead) // block
        middle = values[ahead : ahead + whole * block].unflatten(0, (whole, block)).transpose(1, 2) if whole else None
        first = (start + ahead) // block
        if middle is not None:
            self.data[row, first : first + whole] = middle
        for begin, end in ((0, ahead), (ahead + whole * block, count)):
            for chunk, places, which in self.spans(start + begin, end - begin):
                self.data[row, chunk, :, places] = values[begin:end][which].transpose(0, 1)

    def read(self, row: Tensor, chunk: Tensor, group: Tensor) -> Tensor:
        row, chunk, group = (x.to(self.data.device) for x in (row, chunk, group))
        return self.data[row, chunk, group]

    def _select(self, rows: Sequence[int]) -> None:
        self.data = self.data[list(rows)]

    @property
    def allocated_nbytes(self) -> int:
        return self.data.numel() * self.data.element_size()
