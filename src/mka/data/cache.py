"""The token cache: folders of `mka.storage`, kept between runs."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mka.limits import InputError
from mka.storage import check_folder, write_folder

ADVICE = "free space there, or set XDG_CACHE_HOME to another folder"


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/mka, or ~/.cache/mka."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mka"


def read_entry(folder: Path) -> dict[str, Any] | None:
    """The details an entry was written with, or None if there is none or it is damaged (said on stderr)."""
    if not folder.is_dir():
        return None
    details, damage = check_folder(folder)
    if damage:
        print(f"token cache {folder}: {damage}; it is built again", file=sys.stderr)
    return details


def write_entry(folder: Path, fill: Callable[[Path], Mapping[str, Any]]) -> None:
    """`write_folder`; where it cannot be written, an InputError."""
    try:
        write_folder(folder, fill)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"the token cache {str(folder.parent)!r} cannot be written: {reason}; {ADVICE}") from error
