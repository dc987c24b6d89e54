"""Files are never half-written."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from disks import files, full_at, no_space
from mka import storage
from mka.storage import write_atomically


def test_atomic_write_replaces_and_makes_folders(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b.txt"
    write_atomically(path, "old")
    write_atomically(path, "naïve\n記憶")
    assert path.read_text(encoding="utf-8") == "naïve\n記憶"
    assert files(path.parent) == {"b.txt"}


def break_sync(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(storage.os, "fsync", no_space)


def break_replace(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(storage.os, "replace", no_space)


@pytest.mark.parametrize("break_it", [break_sync, break_replace])
def test_a_failed_atomic_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, break_it: Callable[[pytest.MonkeyPatch], None]
) -> None:
    path = tmp_path / "table.md"
    write_atomically(path, "old")
    with monkeypatch.context() as patch:
        break_it(patch)
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert files(tmp_path) == {"table.md"}


def test_an_atomic_write_cut_short_keeps_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "table.md"
    write_atomically(path, "old")
    with full_at(1000), pytest.raises(OSError, match="File too large"):
        write_atomically(path, "x" * 5000)
    assert path.read_text(encoding="utf-8") == "old"
    assert files(tmp_path) == {"table.md"}


def test_the_final_name_appears_only_with_the_whole_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "table.md"
    replace = os.replace

    def look(source: Path, target: Path) -> None:
        assert not target.exists()
        assert source.read_text(encoding="utf-8") == "whole"
        replace(source, target)

    monkeypatch.setattr(storage.os, "replace", look)
    write_atomically(path, "whole")
    assert path.read_text(encoding="utf-8") == "whole"


def test_json_is_sorted_and_ends_in_a_newline(tmp_path: Path) -> None:
    storage.write_json(tmp_path / "config.json", {"b": 1, "a": [True, None]})
    text = (tmp_path / "config.json").read_text(encoding="utf-8")
    assert json.loads(text) == {"a": [True, None], "b": 1}
    assert text.index('"a"') < text.index('"b"')
    assert text.endswith("}\n")
