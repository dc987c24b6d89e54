"""The user's own files: what is taken, what is passed over, and what is refused in one line."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mka.data import load_corpus
from mka.data.corpus import BY_DOCUMENT, BY_POSITION, SPLITS, Corpus


def all_documents(corpus: Corpus) -> list[tuple[str, str]]:
    return [document for split in SPLITS for document in corpus.documents[split]]


def load(*paths: Path) -> Corpus:
    return load_corpus("text", [str(path) for path in paths])


def test_few_files_are_cut_inside(write_texts: Callable[..., Path]) -> None:
    folder = write_texts(5)
    corpus = load(folder)
    assert corpus.split_rule == BY_POSITION
    for split in SPLITS:
        names = [name for name, _ in corpus.documents[split]]
        assert names == sorted(
            path.relative_to(folder).as_posix() for path in folder.rglob("*.txt")
        )
    for name, text in corpus.documents["train"]:
        rest = dict(corpus.documents["validation"])[name] + dict(corpus.documents["test"])[name]
        assert (text + rest).encode() == (folder / name).read_bytes()
        assert text.endswith("\n")


@pytest.mark.parametrize(("count", "rule"), [(99, BY_POSITION), (100, BY_DOCUMENT)])
def test_a_hundred_files_are_split_by_document(
    write_texts: Callable[..., Path], count: int, rule: str
) -> None:
    corpus = load(write_texts(count, words=20))
    assert corpus.split_rule == rule
    names = [name for name, _ in all_documents(corpus)]
    assert len(set(names)) == count
    assert (len(names) == count) == (rule == BY_DOCUMENT)


def test_place_does_not_matter(write_texts: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_texts(7)
    copy = Path(shutil.copytree(folder, tmp_path / "far" / "away" / "texts"))
    assert load(folder) == load(copy)
    assert load(folder).fingerprint == load(copy).fingerprint
    assert str(tmp_path) not in repr(load(folder))


def test_relative_and_absolute_path_are_the_same(
    write_texts: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_texts(3)
    monkeypatch.chdir(folder)
    assert load(Path(".")) == load(folder)


def test_folder_passes_over_what_is_not_text(write_texts: Callable[..., Path]) -> None:
    folder = write_texts(3)
    clean = load(folder)
    (folder / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    (folder / "latin.txt").write_bytes("café".encode("latin-1"))
    (folder / "blank.txt").write_bytes(b"\n\n  ")
    (folder / ".hidden").write_bytes(b"secret\n")
    (folder / ".git").mkdir()
    (folder / ".git" / "config").write_bytes(b"[core]\n")
    (folder / "broken").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe")
    dirty = load(folder)
    assert dirty.skipped == 3
    assert dirty.fingerprint == clean.fingerprint


def test_unreadable_file_in_a_folder_is_passed_over(
    write_texts: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_texts(3)
    deny(monkeypatch, "001.txt")
    corpus = load(folder)
    assert corpus.skipped == 1
    assert {name for name, _ in all_documents(corpus)} == {"part0/000.txt", "part2/002.txt"}


def test_a_file_counts_once(write_texts: Callable[..., Path], tmp_path: Path) -> None:
    folder = write_texts(4)
    link = tmp_path / "link.txt"
    link.symlink_to(folder / "part0" / "000.txt")
    once, often = (
        load(folder),
        load(folder, folder / "part0" / "000.txt", folder / "part1", link, folder),
    )
    assert often.fingerprint == once.fingerprint


def test_named_files_keep_their_name(write_texts: Callable[..., Path]) -> None:
    folder = write_texts(3)
    corpus = load(folder / "part0" / "000.txt", folder / "part1" / "001.txt")
    assert {name for name, _ in all_documents(corpus)} == {"000.txt", "001.txt"}


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "is blank"),
        (b" \n\t\n", "is blank"),
        (b"abc\0def\n", "NUL"),
        ("naïve".encode("latin-1"), "is not UTF-8 (byte 2)"),
        ("text".encode("utf-16"), "NUL"),
    ],
)
def test_named_file_that_is_not_text(tmp_path: Path, raw: bytes, reason: str, refused) -> None:
    path = tmp_path / "odd name\n.txt"
    path.write_bytes(raw)
    message = refused(load, path)
    assert reason in message
    assert repr(str(path)) in message


@pytest.mark.parametrize("name", ["missing.txt", "x" * 300, "missing/deeper.txt"])
def test_named_file_that_is_not_there(tmp_path: Path, name: str, refused) -> None:
    message = refused(load, tmp_path / name)
    assert name in message


def test_named_thing_that_is_no_file(tmp_path: Path, refused) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor a folder" in refused(load, tmp_path / "pipe")


def test_named_file_that_cannot_be_read(
    write_texts: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, refused
) -> None:
    folder = write_texts(1)
    deny(monkeypatch, "000.txt")
    assert "Permission denied" in refused(load, folder / "part0" / "000.txt")


def test_folder_without_text(tmp_path: Path, refused) -> None:
    (tmp_path / "data.bin").write_bytes(b"\0\1\2")
    assert "without any UTF-8 text" in refused(load, tmp_path)


def test_no_path(refused) -> None:
    assert "--text_path" in refused(load)


def deny(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Tests may run as root, whom no permission bit stops."""
    read_bytes = Path.read_bytes

    def read(path: Path) -> bytes:
        if path.name == name:
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", read)
