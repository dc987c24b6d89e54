"""Which documents a corpus has, and that no document is in two splits."""

import platform
import shutil
import sys
import sysconfig
from dataclasses import replace
from pathlib import Path

import pytest

from mka.data import load_corpus
from mka.data.corpus import SPLITS, Corpus, cut_near, split_by_document, split_by_position


def names_of(corpus: Corpus, split: str) -> set[str]:
    return {name for name, _ in corpus.documents[split]}


def use_stdlib(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(folder)})


@pytest.fixture
def fake_stdlib(tmp_path: Path) -> Path:
    folder = tmp_path / "lib"
    kept = {f"pkg{n % 4}/module{n}.py": f"x = {n}\r\n".encode() for n in range(200)}
    passed_over = {
        "site-packages/other.py": b"x = 1\n",
        "sub/dist-packages/other.py": b"x = 1\n",
        "__pycache__/cached.py": b"x = 1\n",
        "notes.txt": b"not source\n",
    }
    not_text = {
        "latin.py": b"# caf\xe9\n",
        "blank.py": b" \n\n",
        "empty.py": b"",
        "nul.py": b"x = '\0'\n",
    }
    for name, raw in (kept | passed_over | not_text).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)
    return folder


def test_stdlib_takes_source_files_only(fake_stdlib: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    use_stdlib(monkeypatch, fake_stdlib)
    corpus = load_corpus("stdlib")
    names = [name for split in SPLITS for name, _ in corpus.documents[split]]
    assert sorted(names) == sorted(f"pkg{n % 4}/module{n}.py" for n in range(200))
    assert corpus.skipped == 4
    assert dict(corpus.documents["train"])["pkg0/module0.py"] == "x = 0\r\n"
    for split in SPLITS:
        assert [name for name, _ in corpus.documents[split]] == sorted(names_of(corpus, split))


def test_stdlib_does_not_depend_on_its_place(
    fake_stdlib: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_stdlib(monkeypatch, fake_stdlib)
    first = load_corpus("stdlib")
    use_stdlib(monkeypatch, Path(shutil.copytree(fake_stdlib, tmp_path / "elsewhere")))
    second = load_corpus("stdlib")
    assert second.fingerprint == first.fingerprint
    assert second == first
    assert str(tmp_path) not in repr(first)


def test_stdlib_without_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused) -> None:
    use_stdlib(monkeypatch, tmp_path)
    assert "--dataset text" in refused(load_corpus, "stdlib")


def test_the_real_stdlib() -> None:
    corpus = load_corpus("stdlib")
    sizes = {split: sum(len(text) for _, text in corpus.documents[split]) for split in SPLITS}
    counts = {split: len(corpus.documents[split]) for split in SPLITS}
    assert sum(counts.values()) > 300
    assert sum(sizes.values()) > 5_000_000
    assert 0.85 < counts["train"] / sum(counts.values()) < 0.95
    assert "argparse.py" in set.union(*(names_of(corpus, split) for split in SPLITS))
    assert corpus.origin == {
        "interpreter": f"{platform.python_implementation()} {platform.python_version()}"
    }
    assert sys.base_prefix not in repr(corpus.origin)


def test_unknown_dataset(refused) -> None:
    message = refused(load_corpus, "wikitext")
    assert "wikitext103" in message
    assert "'wikitext2'" in message


def test_split_by_document_is_fair_and_never_shares() -> None:
    documents = [(f"d{n}", str(n)) for n in range(4000)]
    splits = split_by_document(documents)
    assert sorted(document for split in SPLITS for document in splits[split]) == sorted(documents)
    shares = {split: len(splits[split]) / len(documents) for split in SPLITS}
    assert shares["train"] == pytest.approx(0.90, abs=0.02)
    assert shares["validation"] == pytest.approx(0.05, abs=0.015)
    assert shares["test"] == pytest.approx(0.05, abs=0.015)


def test_a_new_document_moves_no_other() -> None:
    documents = [(f"d{n}", str(n)) for n in range(300)]
    before, after = split_by_document(documents), split_by_document([("new", "text"), *documents])
    for split in SPLITS:
        assert set(before[split]) <= set(after[split])


@pytest.mark.parametrize(
    "text",
    [
        "line\n" * 1000,
        "line\r\n" * 77,
        "x" * 1000,
        "title\n" + "y" * 5000,
        "é漢🎉\n" * 333,
        "a\nb\n",
        "ab",
        "a",
        "\n",
    ],
)
def test_split_by_position_keeps_every_character(text: str) -> None:
    splits = split_by_position([("d", text)])
    assert "".join(piece for split in SPLITS for _, piece in splits[split]) == text
    assert all(piece for split in SPLITS for _, piece in splits[split])
    if len(text) > 40:
        train, validation, test = (len(splits[split][0][1]) / len(text) for split in SPLITS)
        assert train == pytest.approx(0.90, abs=0.026)
        assert validation == pytest.approx(0.05, abs=0.051)
        assert test == pytest.approx(0.05, abs=0.026)


def test_cuts_lie_at_line_ends() -> None:
    text = "".join(f"line {n} {'x' * (n % 13)}\n" for n in range(1000))
    for share in (0.90, 0.95):
        cut = cut_near(text, share)
        assert text[cut - 1] == "\n"
        assert abs(cut - share * len(text)) < 20


def changed(corpus: Corpus, split: str, documents: list[tuple[str, str]]) -> Corpus:
    return replace(corpus, documents=corpus.documents | {split: documents})


def test_fingerprint_sees_every_part(small_corpus: Corpus) -> None:
    train = small_corpus.documents["train"]
    variants = [
        small_corpus,
        changed(small_corpus, "train", [("other", train[0][1]), *train[1:]]),
        changed(small_corpus, "train", [(train[0][0], train[0][1] + "."), *train[1:]]),
        changed(small_corpus, "train", train[::-1]),
        changed(small_corpus, "train", train[1:]),
        replace(
            small_corpus, documents=small_corpus.documents | {"train": [], "validation": train}
        ),
        changed(small_corpus, "test", [("ab", "c")]),
        changed(small_corpus, "test", [("a", "bc")]),
        changed(small_corpus, "test", [("a", "b"), ("c", "")]),
    ]
    assert len({corpus.fingerprint for corpus in variants}) == len(variants)


def test_fingerprint_ignores_the_order_of_the_dictionary(small_corpus: Corpus) -> None:
    turned = replace(small_corpus, documents=dict(reversed(list(small_corpus.documents.items()))))
    assert turned.fingerprint == small_corpus.fingerprint
