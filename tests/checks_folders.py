"""What a run's folder must be at any instant, and whom it belongs to; the tests and the planted
defects share it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mka import storage
from mka.errors import InputError
from mka.record import folders
from mka.record.folders import note_everything, read_noted, states


def run_folder(folder: Path) -> Path:
    """A run's folder with a manifest over two files."""
    (folder / "curves").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "curves" / "mha.jsonl").write_text("old\n")
    note_everything(folder, ["mha-seed0"])
    return folder


class PowerCut(BaseException):
    """Ends what is going on as a kill does: nobody catches it."""


@contextmanager
def cut_at(call: int, moment: str) -> Iterator[None]:
    """The `call`-th rename of this process is its last deed, or the one before it was."""
    renames, replace = iter(range(1, 100)), os.replace

    def struck(source: Any, target: Any) -> None:
        last = next(renames) == call
        if last and moment == "before":
            raise PowerCut
        replace(source, target)
        if last:
            raise PowerCut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.os, "replace", struck)
        yield


def is_cut(call: int, moment: str, work: Callable[[], None]) -> bool:
    try:
        with cut_at(call, moment):
            work()
    except PowerCut:
        return True
    return False


def assert_whole_after_any_kill(run: Path, path: Path, moment: str) -> None:
    """Killed at each of the renames of writing a file, the folder is whole, and the file the old or
    the new one."""
    name = path.relative_to(run).as_posix()
    before = read_noted(run, path)
    for call in (1, 2, 3):
        if before is not None:
            folders.write_noted(run, path, "old\n")
        assert is_cut(call, moment, lambda: folders.write_noted(run, path, "new\n"))
        assert set(states(run).values()) == {"whole"}
        assert read_noted(run, path) in (before, b"new\n")
        folders.write_noted(run, run / "config.json", f"[{call}]")
        assert set(states(run).values()) == {"whole"}, "what was under way at the kill is forgotten"
        path.write_text("old and new\n")
        noted = states(run)  # a new file is not noted yet if the kill came before anything
        assert noted.get(name, "altered") == "altered"
        path.unlink()
        note_everything(run, ())
    assert not is_cut(4, moment, lambda: folders.write_noted(run, path, "new\n"))
    assert states(run)[name] == "whole"


def assert_claims_go_by_the_folder(place: Path) -> None:
    """Not by what it is called. `place` is the current folder."""
    folder = place / "run"
    folder.mkdir()
    (place / "link").symlink_to(folder)
    with folders.claimed(folder):
        for other in (Path("run"), place / "link", folder / ".." / "run", Path("link")):
            with (
                pytest.raises(InputError, match="another run is writing to"),
                folders.claimed(other),
            ):
                pytest.fail("both have it")
