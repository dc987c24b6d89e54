"""Records in files, mapped for reading.

A state's own file has no name: it is removed from its folder as soon as it is open, so a killed process leaves nothing,
and nobody else can write to it or cut it. Room is set aside before anything is written.
"""

import mmap
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mka.limits import InputError
from mka.memory.store import Budget, RecordForm, Store

SMALL_READ = 64
"""Pages behind reads of so few records stay mapped: those of a token that is decoded."""
COPY_BYTES = 2**24


class MappedFile:
    """A file of records, mapped for reading; what was read is given back, so that it does not count as ours."""

    def __init__(self, handle: int, form: RecordForm, access: int = mmap.MAP_SHARED) -> None:
        self.handle, self.form, self.access = handle, form, access
        self.map: mmap.mmap | None = None
        self.data = torch.empty(0, form.groups, form.block, form.width, dtype=form.dtype)

    def remap(self, chunks: int) -> None:
        """Map the first `chunks` chunks, which the file must hold."""
        if not chunks:
            return
        self.map = mmap.mmap(self.handle, chunks * self.form.chunk_bytes, self.access)
        flat = torch.frombuffer(self.map, dtype=self.form.dtype)
        self.data = flat.view(chunks, self.form.groups, self.form.block, self.form.width)

    def read(self, chunk: Tensor, group: Tensor) -> Tensor:
        """(N, block, width), a copy."""
        found = self.data[chunk, group]
        if self.map is not None and len(chunk) > SMALL_READ:
            self.map.madvise(mmap.MADV_DONTNEED)
        return found

    def close(self) -> None:
        self.data, self.map = self.data[:0].clone(), None
        os.close(self.handle)


class DiskStore(Store):
    """In files without a name, one for each row, in `folder` (None: the system's for temporary files)."""

    def __init__(self, form: RecordForm, rows: int, budget: Budget, folder: str | None = None) -> None:
        super().__init__(form, rows, budget)
        self.folder = folder
        self.files = [MappedFile(self._open(), form) for _ in range(rows)]

    def _open(self) -> int:
        try:
            handle, path = tempfile.mkstemp(prefix=".mka-longterm-", dir=self.folder)
            os.unlink(path)
        except OSError as error:
            raise self._refused(error) from error
        return handle

    def _refused(self, error: OSError) -> InputError:
        where = self.folder or tempfile.gettempdir()
        return InputError(
            f"longterm_folder is {where!r}; it cannot hold the long-term store: {error.strerror}; give a folder on a "
            "disk with room, or longterm_store host"
        )

    def _grow(self, chunks: int) -> None:
        size = self.form.chunk_bytes
        for file in self.files:
            try:
                set_aside(file.handle, self.capacity * size, chunks * size)
                if len(file.data) < chunks:
                    ahead = chunks + chunks // 8
                    os.ftruncate(file.handle, ahead * size)  # room in the map, not on the disk yet
                    file.remap(ahead)
            except OSError as error:
                raise self._refused(error) from error

    def _shrink(self, chunks: int) -> None:
        for file in self.files:
            os.ftruncate(file.handle, chunks * self.form.chunk_bytes)
            os.ftruncate(file.handle, len(file.data) * self.form.chunk_bytes)  # what is mapped, not on the disk

    def write(self, row: int, start: int, values: Tensor) -> None:
        form, values = self.form, values.to("cpu", self.form.dtype)
        first, last = start // form.block, form.chunks(start + len(values))
        place = start - first * form.block
        if len(values) < (last - first) * form.block:  # chunks that are written in part are read first
            held = self.files[row].data[first:last].transpose(1, 2).flatten(0, 1)
            held[place : place + len(values)] = values
            values = held
        raw = values.unflatten(0, (last - first, form.block)).transpose(1, 2).contiguous()
        write_all(self.files[row].handle, raw.view(torch.uint8).numpy(), first * form.chunk_bytes)

    def read(self, row: Tensor, chunk: Tensor, group: Tensor) -> Tensor:
        row, chunk, group = row.cpu(), chunk.cpu(), group.cpu()
        if self.rows == 1:
            return self.files[0].read(chunk, group)
        found = torch.empty(len(row), self.form.block, self.form.width, dtype=self.form.dtype)
        for number, file in enumerate(self.files):
            mine = row == number
            found[mine] = file.read(chunk[mine], group[mine])
        return found

    def _select(self, rows: Sequence[int]) -> None:
        """A row that is taken twice is copied."""
        free, files = set(range(self.rows)) - set(rows), []
        taken: set[int] = set()
        for row in rows:
            files.append(self._copy(self.files[row]) if row in taken else self.files[row])
            taken.add(row)
        for row in free:
            self.files[row].close()
        self.files = files

    def _copy(self, file: MappedFile) -> MappedFile:
        copy = MappedFile(self._open(), self.form)
        end = self.capacity * self.form.chunk_bytes
        try:
            set_aside(copy.handle, 0, end)
            for offset in range(0, end, COPY_BYTES):
                write_all(copy.handle, os.pread(file.handle, min(COPY_BYTES, end - offset), offset), offset)
            os.ftruncate(copy.handle, len(file.data) * self.form.chunk_bytes)
        except OSError as error:
            os.close(copy.handle)
            raise self._refused(error) from error
        copy.remap(len(file.data))
        return copy

    @property
    def allocated_nbytes(self) -> int:
        return self.rows * self.capacity * self.form.chunk_bytes

    def __del__(self) -> None:
        super().__del__()
        for file in getattr(self, "files", ()):
            file.close()


def set_aside(handle: int, start: int, end: int) -> None:
    """Give the file the bytes start .. end, on the disk where the system can promise them."""
    if end > start and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, start, end - start)
    elif end > start:
        os.ftruncate(handle, max(end, os.fstat(handle).st_size))


def write_all(handle: int, data: Any, offset: int) -> None:
    """Write all of a buffer, in as many turns as it takes."""
    left = memoryview(data).cast("B")
    while left:
        written = os.pwrite(handle, left, offset)
        left, offset = left[written:], offset + written
