"""The token cache: folders that `mka.storage` writes and checks, kept between runs."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mka.errors import InputError
from mka.storage import check_folder, write_folder

ADVICE = "free space there, or set XDG_CACHE_HOME to another folder"


def default_cache_dir() -> Path:
    """The folder of the cache: $XDG_CACHE_HOME/mka, or ~/.cache/mka. Raises InputError
    without either."""
    # An empty variable counts as none, as the XDG specification asks.
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given) / "mka"
    try:
        return Path.home() / ".cache" / "mka"
    except RuntimeError:
        # As in a container that runs under a number without a name.
        raise InputError(
            "there is no home folder for the token cache; set XDG_CACHE_HOME to a folder"
        ) from None


def read_entry(folder: Path) -> dict[str, Any] | None:
    """The details that an entry was written with; None if there is no entry, or if it
    is damaged, which is reported on stderr."""
    if not folder.is_dir():
        return None
    details, damage = check_folder(folder)
    # Not an error: everything in the cache can be made again.
    if damage:
        print(f"token cache {folder}: {damage}; it is built again", file=sys.stderr)
    return details


def write_entry(folder: Path, fill: Callable[[Path], Mapping[str, Any]]) -> None:
    """Write an entry.

    Args:
        folder: its place in the cache.
        fill: writes the files into the folder it is given, and returns the details.

    Raises InputError if the cache cannot be written.
    """
    try:
        write_folder(folder, fill)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(
            f"the token cache {str(folder.parent)!r} cannot be written: {reason}; {ADVICE}"
        ) from error
