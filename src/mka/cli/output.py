"""What commands print, and the files that --output names."""

import json
import os
import stat
import sys
from pathlib import Path
from typing import Any

from mka.errors import InputError, printable

MARKS = ("config.json", "bank.json", "manifest.json")
"""Files that tell a folder of ours; the last one lists the others."""
LONGEST_WORD, LONGEST_LINE = 200, 1000
"""Characters of a word in an error message, and of all of it: paths stay whole."""
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


OURS = (
    *("config.json", "environment.json", "results.jsonl", "costs.jsonl", "manifest.json"),
    *("table.md", "model.safetensors", "generation_config.json", "tokenizer.json"),
    *("tokenizer_config.json", "bank.json"),
)
"""Names of files in a run's folder, a saved model or a bank, which nothing else may
take."""


def check_output(name: str, value: str | None) -> None:
    """Raise InputError, naming the option, unless a file can be written there; None is
    allowed."""
    if value is None:
        return
    if not value:
        raise InputError(f"{name} is empty; give the name of a file")
    path = Path(value)
    try:
        mode = mode_of(path)
        above = next(folder for folder in path.absolute().parents if folder.exists())
    except OSError as error:
        raise InputError(f"{name} is {value!r}; it cannot be written: {error.strerror}") from None
    if mode is not None and stat.S_ISDIR(mode):
        raise InputError(f"{name} is {value!r}; it is a folder; give the name of a file")
    if mode is None and not (above.is_dir() and os.access(above, os.W_OK)):
        raise InputError(f"{name} is {value!r}; nothing can be written to {str(above)!r}")
    if mode is not None and is_ours(Path(os.path.realpath(path))):
        raise InputError(
            f"{name} is {value!r}; it is a file of a run, a saved model or a bank; give another "
            "name"
        )


def mode_of(path: Path) -> int | None:
    """What kind of file is there; None: nothing. Raises OSError for a name that cannot
    be looked up, such as one that is too long."""
    try:
        return path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def is_ours(path: Path) -> bool:
    """Whether an existing file is a part of a run's folder, a saved model or a bank."""
    folders = path.parents[:3]
    if path.name in OURS and any((path.parent / name).is_file() for name in MARKS):
        return True
    from mka.record.folders import manifest_of

    for folder in folders:
        if (folder / MARKS[-1]).is_file():
            content = manifest_of(folder)
            noted = {} if content is None else content["files"] | content.get("pending", {})
            if path.relative_to(folder).as_posix() in noted:
                return True
    return False


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
        # line, and what would command a terminal.
        line = printable(f"{program}: {' '.join(str(error).split())}")
        print(shortened(line), file=sys.stderr)
    return status


def shortened(line: str) -> str:
    """The line without the middle of words beyond LONGEST_WORD, and without its own
    beyond LONGEST_LINE."""
    words = line.split(" ")
    line = " ".join(w if len(w) <= LONGEST_WORD else f"{w[:60]}...{w[-60:]}" for w in words)
    if len(line) > LONGEST_LINE:
        # The beginning names the option, the end says what is allowed.
        kept = (LONGEST_LINE - 5) // 2
        line = f"{line[:kept]} ... {line[-kept:]}"
    return line
