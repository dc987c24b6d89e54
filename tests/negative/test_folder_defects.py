"""Planted defects of folders: each turns a check red that is green as things are."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from checks_folders import assert_claims_go_by_the_folder, assert_whole_after_any_kill, run_folder
from checks_training import assert_exports_the_step
from mka.errors import InputError
from mka.record import folders
from mka.storage import write_atomically
from mka.training import Checkpoints


def file_first(folder: Path, path: Path, text: str) -> None:
    """The manifest learns of the new file when it is there already."""
    content = folders.manifest_of(folder)
    assert content is not None
    write_atomically(path, text)
    noted = {path.relative_to(folder).as_posix(): folders.entry_of(text.encode())}
    folders.write_manifest(folder, content | {"files": content["files"] | noted})


def manifest_first(folder: Path, path: Path, text: str) -> None:
    """The manifest forgets the old file before it is replaced."""
    content = folders.manifest_of(folder)
    assert content is not None
    noted = {path.relative_to(folder).as_posix(): folders.entry_of(text.encode())}
    folders.write_manifest(folder, content | {"files": content["files"] | noted})
    write_atomically(path, text)


def forgetting_the_others(folder: Path, path: Path, text: str) -> None:
    """What was under way at a kill is not under way any more when another file is written."""
    content = folders.manifest_of(folder)
    assert content is not None
    noted = {path.relative_to(folder).as_posix(): folders.entry_of(text.encode())}
    folders.write_manifest(folder, content | {"pending": noted})
    write_atomically(path, text)
    folders.write_manifest(folder, content | {"files": content["files"] | noted, "pending": {}})


@pytest.mark.parametrize("write", [file_first, manifest_first, forgetting_the_others])
def test_a_file_that_is_noted_in_another_order_turns_red(
    tmp_path: Path, write: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "write_noted", write)
    run = run_folder(tmp_path / "run")
    with pytest.raises((AssertionError, InputError)):
        assert_whole_after_any_kill(run, run / "curves" / "mha.jsonl", "after")


def test_a_claim_by_the_folders_name_turns_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: set[str] = set()

    @contextmanager
    def by_name(folder: Path, name: str = "") -> Iterator[None]:
        if str(folder) in held:
            raise InputError("another run is writing to it")
        held.add(str(folder))
        yield

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folders, "claimed", by_name)
    with pytest.raises(pytest.fail.Exception, match="both have it"):
        assert_claims_go_by_the_folder(tmp_path)


def test_an_export_of_the_newest_turns_red(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whatever checkpoint is there, unchecked."""

    def export_newest(checkpoints: Checkpoints, step: int, path: Path) -> None:
        os.link(
            checkpoints.folder / f"step-{checkpoints.steps()[0]:08d}" / "model.safetensors", path
        )

    assert_exports_the_step(tmp_path / "as it is")
    monkeypatch.setattr(Checkpoints, "export_weights", export_newest)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        assert_exports_the_step(tmp_path / "planted")
