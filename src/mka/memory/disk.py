"""Records in files, mapped for reading.

A state's own file has no name: it is removed from its folder as soon as it is open, so
a killed process leaves nothing behind, and nobody else can write to it or truncate it.
Space is reserved before anything is written.
"""

import ctypes
import mmap
import os
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mka.errors import InputError
from mka.memory.store import Budget, RecordForm, Store

LIBC = ctypes.CDLL(None)
"""The C library of this process."""
SMALL_READ = 64
"""After reads of at most this many records, such as those of one decoded token, the
pages stay in memory."""
COPY_BYTES = 2**24
"""Bytes per step when a file is copied."""


class MappedFile:
    """A file of records, mapped for reading.

    Args:
        handle: descriptor of the open file; `close` closes it.
        form: the form of its records.
    """

    def __init__(self, handle: int, form: RecordForm) -> None:
        self.handle, self.form = handle, form
        self.map: mmap.mmap | None = None
        self.data = torch.empty(0, form.groups, form.block, form.width, dtype=form.dtype)

    def remap(self, chunks: int) -> None:
        """Map the first `chunks` chunks, for which the file must be long enough."""
        # An empty range cannot be mapped.
        if not chunks:
            return
        self.map = mmap.mmap(self.handle, chunks * self.form.chunk_bytes)
        flat = torch.frombuffer(self.map, dtype=self.form.dtype)
        self.data = flat.view(chunks, self.form.groups, self.form.block, self.form.width)

    def read(self, chunk: Tensor, group: Tensor) -> Tensor:
        """A copy of the N records named by two (N,) tensors, as (N, block, width)."""
        found = self.data[chunk, group]
        # Pages that were read would count as memory of this process; a large read would
        # keep much of the file there.
        if self.map is not None and len(chunk) > SMALL_READ:
            self.map.madvise(mmap.MADV_DONTNEED)
        return found

    def close(self) -> None:
        """Close the file. The mapping goes with the last tensor that refers to it."""
        self.data, self.map = self.data[:0].clone(), None
        os.close(self.handle)


class MappedRecords:
    """The records of a finished file, mapped for reading. The file is not kept open, so
    that there may be any number of them.

    Args:
        path: the file.
        form: the form of its records.
        chunks: how many chunks it holds.
    """

    def __init__(self, path: Path, form: RecordForm, chunks: int) -> None:
        shape = chunks, form.groups, form.block, form.width
        self.data = torch.empty(0, *shape[1:], dtype=form.dtype)
        if chunks:
            # Private, copy on write: nothing that happens to the mapped tensor reaches
            # the file. Python's mmap would keep a descriptor of it.
            flat = torch.from_file(
                str(path), shared=False, size=chunks * form.chunk_bytes, dtype=torch.uint8
            )
            self.data = flat.view(form.dtype).view(shape)

    def read(self, chunk: Tensor, group: Tensor) -> Tensor:
        """A copy of the N records named by two (N,) tensors, as (N, block, width)."""
        found = self.data[chunk, group]
        if len(chunk) > SMALL_READ:
            # As in `MappedFile.read`; a failure would only cost memory.
            size = self.data.numel() * self.data.element_size()
            LIBC.madvise(
                ctypes.c_void_p(self.data.data_ptr()), ctypes.c_size_t(size), mmap.MADV_DONTNEED
            )
        return found


class DiskStore(Store):
    """Records in files without a name, one file per row.

    folder: the directory of the files. Default: None, the system's temporary directory.
    Raises InputError if the directory cannot hold them.
    """

    def __init__(
        self, form: RecordForm, rows: int, budget: Budget, folder: str | None = None
    ) -> None:
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
            f"longterm_folder is {where!r}; it cannot hold the long-term store: "
            f"{error.strerror}; choose a folder on a disk with room, or longterm_store host"
        )

    def _grow(self, chunks: int) -> None:
        size = self.form.chunk_bytes
        for file in self.files:
            try:
                set_aside(file.handle, self.capacity * size, chunks * size)
                # Mapped an eighth ahead, so that not every chunk maps again. Truncating
                # to a larger size gives the map room but takes none on the disk.
                if len(file.data) < chunks:
                    ahead = chunks + chunks // 8
                    os.ftruncate(file.handle, ahead * size)
                    file.remap(ahead)
            except OSError as error:
                raise self._refused(error) from error

    def _shrink(self, chunks: int) -> None:
        for file in self.files:
            # The first call frees the space on the disk. The second restores the
            # length: reading a mapped page beyond the end of a file would kill the
            # process.
            os.ftruncate(file.handle, chunks * self.form.chunk_bytes)
            os.ftruncate(file.handle, len(file.data) * self.form.chunk_bytes)

    def write(self, row: int, start: int, values: Tensor) -> None:
        """Write values (N, groups, width) as entries start .. start + N of a row."""
        form, values = self.form, values.to("cpu", self.form.dtype)
        first, last = start // form.block, form.chunks(start + len(values))
        place = start - first * form.block
        # Records are written whole, so chunks that change only in part are read first.
        if len(values) < (last - first) * form.block:
            held = self.files[row].data[first:last].transpose(1, 2).flatten(0, 1)
            held[place : place + len(values)] = values
            values = held
        raw = values.unflatten(0, (last - first, form.block)).transpose(1, 2).contiguous()
        write_all(self.files[row].handle, raw.view(torch.uint8).numpy(), first * form.chunk_bytes)

    def read(self, row: Tensor, chunk: Tensor, group: Tensor) -> Tensor:
        """The N records named by three (N,) tensors, as (N, block, width), on the
        CPU."""
        row, chunk, group = row.cpu(), chunk.cpu(), group.cpu()
        if self.rows == 1:
            return self.files[0].read(chunk, group)
        found = torch.empty(len(row), self.form.block, self.form.width, dtype=self.form.dtype)
        for number, file in enumerate(self.files):
            mine = row == number
            found[mine] = file.read(chunk[mine], group[mine])
        return found

    def _select(self, rows: Sequence[int]) -> None:
        """A row that is taken a second time is copied; the first time its file is
        passed on."""
        free, files = set(range(self.rows)) - set(rows), []
        taken: set[int] = set()
        for row in rows:
            files.append(self._copy(self.files[row]) if row in taken else self.files[row])
            taken.add(row)
        for row in free:
            self.files[row].close()
        self.files = files

    def __deepcopy__(self, memo: dict[int, Any]) -> "DiskStore":
        """A store with files of its own, as `copy.deepcopy` of a cache asks for it.

        Raises InputError if the folder cannot hold the copies.
        """
        copied = DiskStore(self.form, 0, deepcopy(self.budget, memo), self.folder)
        memo[id(self)] = copied
        copied.capacity, copied.rows = self.capacity, self.rows
        for file in self.files:
            copied.files.append(copied._copy(file))
        return copied

    def _copy(self, file: MappedFile) -> MappedFile:
        copy = MappedFile(self._open(), self.form)
        end = self.capacity * self.form.chunk_bytes
        try:
            set_aside(copy.handle, 0, end)
            for offset in range(0, end, COPY_BYTES):
                write_all(
                    copy.handle,
                    os.pread(file.handle, min(COPY_BYTES, end - offset), offset),
                    offset,
                )
            # As long as the original, so that the same chunks can be mapped.
            os.ftruncate(copy.handle, len(file.data) * self.form.chunk_bytes)
        except OSError as error:
            os.close(copy.handle)
            raise self._refused(error) from error
        copy.remap(len(file.data))
        return copy

    @property
    def allocated_nbytes(self) -> int:
        """Bytes that the files take on the disk, reserved space included."""
        return self.rows * self.capacity * self.form.chunk_bytes

    def __del__(self) -> None:
        super().__del__()
        for file in getattr(self, "files", ()):
            file.close()


def set_aside(handle: int, start: int, end: int) -> None:
    """Reserve the bytes start .. end of the file, on the disk if the system can do
    that."""
    # Otherwise a full disk would show only as a failed write, in the middle of a call.
    if end > start and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, start, end - start)
    elif end > start:
        os.ftruncate(handle, max(end, os.fstat(handle).st_size))


def write_all(handle: int, data: Any, offset: int) -> None:
    """Write all of a buffer at an offset; pwrite may write less than it is given."""
    left = memoryview(data).cast("B")
    while left:
        written = os.pwrite(handle, left, offset)
        left, offset = left[written:], offset + written
