"""Disks that fill up, and what lies in a folder."""

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mka.memory import disk


@contextmanager
def full_at(size: int) -> Iterator[None]:
    """No file of this process may grow past `size` bytes: a write that crosses it is cut, the next
    one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def full_after(patch: pytest.MonkeyPatch, turns: int) -> None:
    """The disk has room for so many more extensions of a long-term store's files."""
    real, left = disk.set_aside, iter(range(turns))

    def set_aside(handle: int, start: int, end: int) -> None:
        real(handle, start, end) if next(left, None) is not None else no_space()

    patch.setattr(disk, "set_aside", set_aside)


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
