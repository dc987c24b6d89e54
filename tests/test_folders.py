"""Folders of runs and models: whole at every instant, altered never unnoticed, one writer at a
time."""

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checks_folders import (
    assert_claims_go_by_the_folder,
    assert_whole_after_any_kill,
    is_cut,
    run_folder,
)
from disks import files
from mka import storage
from mka.errors import InputError
from mka.record import folders
from mka.record.folders import check_saved, claimed, read_noted, states, write_noted
from mka.storage import MANIFEST, replace_folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with a manifest over two files."""
    return run_folder(tmp_path / "run")


def test_where_there_is_no_manifest_files_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "curves" / "mha.jsonl"
    assert read_noted(tmp_path, path) is None
    write_noted(tmp_path, path, "a")
    path.write_text("b")
    assert read_noted(tmp_path, path) == b"b"
    assert states(tmp_path) == {}
    check_saved(tmp_path)
    assert files(tmp_path) == {"curves"}


def test_what_is_written_is_noted_and_what_is_altered_is_refused(run: Path) -> None:
    path = run / "curves" / "mka.jsonl"
    write_noted(run, path, "naïve\n")
    assert read_noted(run, path) == "naïve\n".encode()
    assert states(run) == {
        "config.json": "whole",
        "curves/mha.jsonl": "whole",
        "curves/mka.jsonl": "whole",
    }
    path.write_text("naive\n")
    assert states(run)["curves/mka.jsonl"] == "altered"
    with pytest.raises(InputError) as refused:
        read_noted(run, path)
    assert str(refused.value) == (
        f"{path} is altered: it is not as it was written; put it back, or delete "
        f"{run / MANIFEST} to accept the folder "
        "as it is"
    )
    path.unlink()
    assert states(run)["curves/mka.jsonl"] == "missing"
    assert read_noted(run, path) is None
    (run / MANIFEST).unlink()
    assert read_noted(run, run / "config.json") == b"{}"


@pytest.mark.parametrize("moment", ["before", "after"])
@pytest.mark.parametrize("name", ["mha", "mka"])
def test_a_kill_at_any_instant_leaves_a_whole_folder(run: Path, name: str, moment: str) -> None:
    """Of a file that is replaced and of a new one; what is written next is noted as ever."""
    assert_whole_after_any_kill(run, run / "curves" / f"{name}.jsonl", moment)


def test_a_reader_meanwhile_sees_the_old_or_the_new(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is replaced between a reader's look at the manifest and its look at the file."""
    path, manifest_of, texts = (
        run / "curves" / "mha.jsonl",
        folders.manifest_of,
        iter(["new\n", "newer\n"]),
    )

    def overtaken(folder: Path) -> dict[str, Any] | None:
        content = manifest_of(folder)
        with monkeypatch.context() as patch:
            patch.setattr(folders, "manifest_of", manifest_of)
            if text := next(texts, None):
                write_noted(run, path, text)
        return content

    with monkeypatch.context() as patch:
        patch.setattr(folders, "manifest_of", overtaken)
        assert read_noted(run, path) == b"newer\n"
        texts = iter(["even newer\n"])
        assert set(states(run).values()) == {"whole"}
    assert read_noted(run, path) == b"even newer\n"


def test_a_manifest_that_is_altered_anywhere_is_noticed(run: Path) -> None:
    raw = (run / MANIFEST).read_bytes()
    for place in range(len(raw)):
        changed = bytearray(raw)
        changed[place] ^= 1 << (3 * place) % 8
        (run / MANIFEST).write_bytes(changed)
        with pytest.raises(
            InputError, match=r"manifest\.json is altered: it is not as it was written; put it back"
        ):
            states(run)
    for content in (
        *(raw[:size] for size in range(0, len(raw), 9)),
        b"{}",
        b"[]",
        b"null",
        b'{"content": {}}',
    ):
        (run / MANIFEST).write_bytes(content)
        for look in (
            states,
            check_saved,
            folders.noted_results,
            lambda run: read_noted(run, run / "config.json"),
        ):
            with pytest.raises(InputError, match=r"manifest\.json is altered"):
                look(run)
    (run / MANIFEST).write_text(
        storage.manifest_text({"files": [], "details": {}}), encoding="utf-8"
    )
    with pytest.raises(InputError, match=r"manifest\.json is altered"):
        states(run)


# ---- saved models


def model_of(word: str) -> Callable[[Path], dict[str, Any]]:
    def fill(folder: Path) -> dict[str, Any]:
        (folder / "config.json").write_text(json.dumps({"is": word}))
        (folder / "templates").mkdir()
        (folder / "templates" / "chat.jinja").write_text(word)
        return {}

    return fill


@pytest.mark.parametrize("name", ["config.json", "templates/chat.jinja"])
def test_every_file_of_a_saved_folder_is_checked(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    replace_folder(folder, model_of("new"))
    check_saved(folder)
    (folder / "notes.txt").write_text("mine")
    check_saved(folder)
    (folder / name).write_text("{}")
    with pytest.raises(
        InputError,
        match=rf"{name} is altered: .* delete .*manifest\.json to accept the folder as it is",
    ):
        check_saved(folder)
    (folder / name).unlink()
    with pytest.raises(InputError, match=rf"{name} is missing: "):
        check_saved(folder)
    (folder / MANIFEST).unlink()
    check_saved(folder)


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_folder_that_is_replaced_is_the_old_one_or_the_new_one(
    tmp_path: Path, moment: str
) -> None:
    """At no instant both, and never a part."""
    folder = tmp_path / "model"
    for call in (1, 2, 3):
        replace_folder(folder, model_of("old"))
        assert is_cut(call, moment, lambda: replace_folder(folder, model_of("new")))
        if folder.exists():
            check_saved(folder)
            assert (folder / MANIFEST).is_file()
            assert json.loads((folder / "config.json").read_text()) in (
                {"is": "old"},
                {"is": "new"},
            )
        replace_folder(folder, model_of("newest"))
        assert files(tmp_path) == {"model"}, "what the kill left is swept up"
        assert (folder / "templates" / "chat.jinja").read_text() == "newest"


# ---- one writer


def test_the_second_is_told_and_the_claim_is_given_back(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    for _ in range(2):
        with claimed(folder), claimed(folder, "model"), claimed(folder, "other"):
            for name in ("", "model"):
                with pytest.raises(InputError) as refused, claimed(folder, name):
                    pytest.fail("both have it")
                assert str(refused.value) == (
                    f"another run is writing to {folder / name}; wait until it has ended, or "
                    "choose another "
                    "--output_dir"
                )


def test_one_folder_by_other_names_is_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_claims_go_by_the_folder(tmp_path)


def test_what_goes_wrong_inside_is_not_taken_for_the_claim(tmp_path: Path) -> None:
    with pytest.raises(BlockingIOError), claimed(tmp_path):
        raise BlockingIOError
    with claimed(tmp_path):
        pass


def test_of_many_that_make_a_folder_at_once_one_has_it(tmp_path: Path) -> None:
    count = 8
    start, tried, won = (
        threading.Barrier(count, timeout=60),
        threading.Barrier(count, timeout=60),
        [],
    )

    def begin(number: int) -> None:
        start.wait()
        try:
            with claimed(tmp_path / "new" / "run"):
                won.append(number)
                tried.wait()
        except InputError:
            tried.wait()

    threads = [threading.Thread(target=begin, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(
            InputError,
            match=r"output_dir is '.*file/run', which cannot be created: Not a directory",
        ),
        claimed(tmp_path / "file" / "run"),
    ):
        pytest.fail("it was made")
