"""What commands print, and the files that --output names."""

import json
import os
import sys
from pathlib import Path
from typing import Any

GO_ON = "run the same command again to resume; finished results are kept"


class JsonLines:
    """The file of --output: one JSON line per row; with path None there is no file."""

    def __init__(self, path: str | None) -> None:
        self.path, self.lines = path, list[str]()

    def add(self, row: dict[str, Any]) -> None:
        """Append a row. Raises OSError if the file cannot be written."""
        self.lines.append(json.dumps(row))
        # The whole file is written again, so that a kill never leaves half a line in
        # it.
        if self.path is not None:
            from mka.storage import write_atomically  # what the overview does not need

            write_atomically(Path(self.path), "\n".join(self.lines) + "\n")


def is_first_rank(name: str = "RANK") -> bool:
    """Whether this process is the one that prints.

    name: the environment variable in which the launcher numbers its processes from 0.
    """
    return os.environ.get(name, "0") == "0"


def complain(program: str, error: object, status: int) -> int:
    """Print one line on stderr, on local rank 0 only; returns `status`."""
    # The local rank, not the global one: on every machine somebody reads the standard
    # error.
    if is_first_rank("LOCAL_RANK"):
        # An error's text may hold line breaks, which would break the promise of one
        # line.
        print(f"{program}: {' '.join(str(error).split())}", file=sys.stderr)
    return status
