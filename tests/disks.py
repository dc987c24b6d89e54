"""Disks that fill up, and what lies in a folder."""

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def full_at(size: int) -> Iterator[None]:
    """No file of this process may grow past `size` bytes: a write that crosses it is cut, the next one fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}
