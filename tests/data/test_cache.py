"""The token cache is whole or not there, whatever happens to it."""

import errno
import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mka import storage
from mka.data import Corpus, TextTokenizer, TokenizedCorpus, prepare_tokens, tokenizer, tokens
from mka.data.cache import default_cache_dir, read_entry, write_entry

FILES = (
    "tokenizer.json",
    "train.ids",
    "validation.ids",
    "validation.bytes",
    "test.ids",
    "test.bytes",
    "manifest.json",
)


@pytest.fixture(scope="module")
def built(small_corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a whole entry; tests work on copies."""
    root = tmp_path_factory.mktemp("built")
    return root / prepare_tokens(small_corpus, "bpe", 400, root).fingerprint


@pytest.fixture
def entry(built: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(built, tmp_path / "cache" / built.name))


def prepare(corpus: Corpus, cache_dir: Path) -> TokenizedCorpus:
    return prepare_tokens(corpus, "bpe", 400, cache_dir)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def visible(folder: Path) -> list[str]:
    """What a cache folder holds besides its (empty) lock files."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".lock")


def test_an_entry_is_these_files(built: Path) -> None:
    assert sorted(contents(built)) == sorted(FILES)
    assert visible(built.parent) == [built.name]
    assert len(built.name) == 64
    manifest = json.loads((built / "manifest.json").read_text(encoding="utf-8"))
    for name, recorded in manifest["content"]["files"].items():
        raw = (built / name).read_bytes()
        assert recorded == {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    assert sorted(manifest["content"]["files"]) == sorted(set(FILES) - {"manifest.json"})


def test_second_run_neither_trains_nor_encodes(
    entry: Path,
    small_corpus: Corpus,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def never(*args: object) -> None:
        raise AssertionError("the cache was not used")

    monkeypatch.setattr(tokenizer, "train_bpe", never)
    monkeypatch.setattr(TextTokenizer, "encode_batch", never)
    monkeypatch.setattr(TextTokenizer, "encode_batch_with_ends", never)
    monkeypatch.setattr(tokens, "write_entry", never)
    prepared = prepare(small_corpus, entry.parent)
    assert prepared.fingerprint == entry.name
    assert capsys.readouterr() == ("", "")


def test_first_and_second_run_agree(small_corpus: Corpus, tmp_path: Path) -> None:
    first, second = (prepare(small_corpus, tmp_path) for _ in range(2))
    assert first.summary == second.summary
    assert list(first.summary["splits"]) == list(second.summary["splits"])
    assert first.tokenizer.backend.to_str() == second.tokenizer.backend.to_str()
    assert first.tokenizer.eos_id == second.tokenizer.eos_id
    for split in first.splits:
        assert first.splits[split].ids.tolist() == second.splits[split].ids.tolist()


def test_loaded_tokenizer_still_treats_text_as_text(entry: Path, small_corpus: Corpus) -> None:
    loaded = prepare(small_corpus, entry.parent).tokenizer
    assert loaded.eos_id not in loaded.encode_batch(["a<|endoftext|>b"])[0]


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def lengthen(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"\n")


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("harm", [truncate, lengthen, empty, flip, Path.unlink])
@pytest.mark.parametrize("name", FILES)
def test_damage_is_seen_and_mended(
    name: str,
    harm: Callable[[Path], None],
    entry: Path,
    built: Path,
    small_corpus: Corpus,
    capsys: pytest.CaptureFixture[str],
) -> None:
    harm(entry / name)
    prepared = prepare(small_corpus, entry.parent)
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
    assert name in said.err
    assert entry.name in said.err
    assert prepared.fingerprint == entry.name
    assert contents(entry) == contents(built)
    assert visible(entry.parent) == [entry.name]


def test_every_byte_of_the_manifest_matters(entry: Path) -> None:
    raw = (entry / "manifest.json").read_bytes()
    for place in range(0, len(raw), 7):
        changed = bytearray(raw)
        changed[place] ^= 1
        (entry / "manifest.json").write_bytes(changed)
        assert storage.check_folder(entry)[0] is None, place


@pytest.mark.parametrize(
    "content", ["[]", "{}", "null", '{"content": {}}', '{"content": 3}', "\udcff"]
)
def test_manifest_of_another_shape(entry: Path, content: str) -> None:
    (entry / "manifest.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert read_entry(entry) is None


@pytest.mark.parametrize("error", [RuntimeError("midway"), KeyboardInterrupt()])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_failed_build_leaves_nothing(
    error: BaseException,
    after: int,
    small_corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_split = tokens.write_split
    done: list[str] = []

    def write(documents, tokenizer, dtype, folder, split):
        if len(done) == after:
            raise error
        done.append(split)
        return write_split(documents, tokenizer, dtype, folder, split)

    with monkeypatch.context() as patch:
        patch.setattr(tokens, "write_split", write)
        with pytest.raises(type(error)):
            prepare(small_corpus, tmp_path)
    assert visible(tmp_path) == []
    assert len(prepare(small_corpus, tmp_path).splits["train"].ids) > 0


def test_failed_repair_keeps_nothing_half_written(
    entry: Path, small_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    flip(entry / "test.ids")
    before = contents(entry)
    monkeypatch.setattr(tokens, "write_split", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(small_corpus, entry.parent)
    assert contents(entry) == before
    assert visible(entry.parent) == [entry.name]


def test_killed_build_is_swept_up(small_corpus: Corpus, built: Path, tmp_path: Path) -> None:
    left = tmp_path / f".{built.name}.building"
    left.mkdir()
    (left / "train.ids").write_bytes(b"half")
    prepare(small_corpus, tmp_path)
    assert visible(tmp_path) == [built.name]
    assert contents(tmp_path / built.name) == contents(built)


def test_file_size_limit_is_one_line(small_corpus: Corpus, tmp_path: Path, refused) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        message = refused(prepare, small_corpus, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in message
    assert "XDG_CACHE_HOME" in message
    assert visible(tmp_path) == []


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_is_one_line(
    call: str, small_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused
) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(storage.os, call, full)
    message = refused(prepare, small_corpus, tmp_path)
    assert "No space left on device" in message
    assert repr(str(tmp_path)) in message
    assert visible(tmp_path) == []


def test_cache_folder_that_cannot_be(small_corpus: Corpus, tmp_path: Path, refused) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    assert "cannot be written" in refused(prepare, small_corpus, tmp_path / "file")


def test_manifest_is_written_last(
    small_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    sync_file, write_atomically = storage.sync_file, storage.write_atomically
    monkeypatch.setattr(
        storage, "sync_file", lambda path: order.append(path.name) or sync_file(path)
    )
    monkeypatch.setattr(
        storage,
        "write_atomically",
        lambda path, text: order.append(path.name) or write_atomically(path, text),
    )
    prepare(small_corpus, tmp_path)
    assert order[-1] == "manifest.json"
    assert sorted(order) == sorted(FILES)


def test_a_finished_entry_is_not_built_again(tmp_path: Path) -> None:
    def never(folder: Path) -> dict[str, object]:
        raise AssertionError("built twice")

    write_entry(tmp_path / "entry", lambda folder: {"n": 1})
    write_entry(tmp_path / "entry", never)
    assert read_entry(tmp_path / "entry") == {"n": 1}


RACER = """
import sys, time
from pathlib import Path
from mka.data.cache import read_entry, write_entry
def fill(folder):
    with open(sys.argv[1], "a") as log:
        log.write(folder.name)
    time.sleep(0.3)
    (folder / "data").write_bytes(b"x" * 1000)
    return {"n": 1}
for entry in map(Path, sys.argv[2:]):
    write_entry(entry, fill)
    assert read_entry(entry) == {"n": 1}
"""


def test_racing_processes_build_once(tmp_path: Path) -> None:
    log, fresh, damaged = (
        tmp_path / "log",
        tmp_path / "cache" / "fresh",
        tmp_path / "cache" / "damaged",
    )
    write_entry(damaged, lambda folder: {"n": 0})
    empty(damaged / "manifest.json")
    command = [sys.executable, "-c", RACER, str(log), str(fresh), str(damaged)]
    racers = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for racer in racers:
        assert racer.communicate(timeout=120)[1] == ""
        assert racer.returncode == 0
    assert log.read_text(encoding="utf-8") == ".fresh.building.damaged.building"
    assert visible(fresh.parent) == ["damaged", "fresh"]


def test_default_place(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, small_corpus: Corpus
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    prepared = prepare_tokens(small_corpus, "bpe", 400)
    assert visible(tmp_path / "xdg" / "mka") == [prepared.fingerprint]
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "mka"
