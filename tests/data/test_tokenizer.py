"""Tokenizers: the trained one, the genuine GPT-2 one, and pretrained ones out of folders."""

import io
import json
import random
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors, trainers

from mka.data import Corpus, TextTokenizer, load_tokenizer, tokenizer
from mka.data.encoding import bytes_of_tokens
from mka.data.tokenizer import (
    BYTE_LEVEL,
    END_OF_TEXT,
    LONGEST_WORD,
    byte_level,
    has_long_word,
    trainable,
)

TEXTS = [
    "Hello world",
    "naïve façade",
    "漢字 記憶",
    "🎉 👩‍👩‍👧",
    "a\r\n\tb\n\n  c ",
    "\ufeffx\u0301",
    f"a{END_OF_TEXT}b",
]


@pytest.fixture(scope="module")
def train_texts(small_corpus: Corpus) -> list[str]:
    return [text for _, text in small_corpus.documents["train"]]


@pytest.fixture(scope="module")
def bpe(train_texts: list[str]) -> TextTokenizer:
    return load_tokenizer("bpe", train_texts, 400)


@pytest.fixture(scope="module")
def gpt2() -> TextTokenizer:
    return load_tokenizer("gpt2")


def test_training_is_deterministic(bpe: TextTokenizer, train_texts: list[str]) -> None:
    again = load_tokenizer("bpe", iter(train_texts), 400)
    assert again.backend.to_str() == bpe.backend.to_str()


def test_trained_vocabulary(bpe: TextTokenizer) -> None:
    assert bpe.name == "bpe"
    assert bpe.vocab_size <= 400
    assert bpe.decode([bpe.eos_id]) == END_OF_TEXT
    assert len(bpe.encode_batch(["attend memory"])[0]) < len("attend memory") / 2


def test_smallest_vocabulary_holds_every_byte(train_texts: list[str], refused) -> None:
    assert load_tokenizer("bpe", train_texts, 257).vocab_size == 257
    assert "257" in refused(load_tokenizer, "bpe", train_texts, 256)


def test_gpt2_is_the_genuine_one(gpt2: TextTokenizer) -> None:
    assert gpt2.vocab_size == 50257
    assert gpt2.eos_id == 50256
    assert gpt2.encode_batch(["Hello world"]) == [[15496, 995]]


def test_gpt2_agrees_with_transformers(gpt2: TextTokenizer, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    gpt2.backend.model.save(str(tmp_path))
    reference = transformers.GPT2TokenizerFast.from_pretrained(str(tmp_path))
    assert len(reference) == 50257
    for text in TEXTS[:-1]:
        assert gpt2.encode_batch([text])[0] == reference.encode(text, add_special_tokens=False)


def test_gpt2_without_its_package(monkeypatch: pytest.MonkeyPatch, refused) -> None:
    monkeypatch.setattr(tokenizer, "GPT2_PACKAGE", "no_such_package_here")
    assert "no_such_package_here" in refused(load_tokenizer, "gpt2")


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("which", ["bpe", "gpt2"])
def test_round_trip(which: str, text: str, request: pytest.FixtureRequest) -> None:
    chosen: TextTokenizer = request.getfixturevalue(which)
    ids = chosen.encode_batch([text])[0]
    assert chosen.decode(ids) == text
    assert chosen.eos_id not in ids
    with_ends = chosen.encode_batch_with_ends([text])[0]
    assert with_ends[0] == ids
    assert with_ends[1][-1] == len(text)
    assert with_ends[1] == sorted(with_ends[1])


def pretrained_folder(folder: Path, backend: Tokenizer, eos_token: str | None = None) -> str:
    transformers = pytest.importorskip("transformers")
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=eos_token
    ).save_pretrained(str(folder))
    return str(folder)


def copy_of(backend: Tokenizer) -> Tokenizer:
    return Tokenizer.from_str(backend.to_str())


def test_folder_of_transformers(bpe: TextTokenizer, tmp_path: Path) -> None:
    backend = copy_of(bpe.backend)
    backend.add_special_tokens(["<stop>"])
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    spec = pretrained_folder(tmp_path / "tok", backend, "<stop>")
    loaded = load_tokenizer(spec)
    assert loaded.name == spec
    assert loaded.decode([loaded.eos_id]) == "<stop>"
    text = "attend  \n\n   memory <stop> key value query window chunk"
    assert loaded.encode_batch([text]) == bpe.encode_batch([text])
    assert loaded.encode_batch_with_ends([text]) == bpe.encode_batch_with_ends([text])


@pytest.mark.parametrize("as_file", [True, False])
def test_bare_tokenizer_json(bpe: TextTokenizer, tmp_path: Path, as_file: bool) -> None:
    bpe.backend.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json" if as_file else tmp_path))
    assert loaded.eos_id == bpe.eos_id
    assert loaded.encode_batch(TEXTS) == bpe.encode_batch(TEXTS)


def test_ids_with_holes(tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "</s>": 900}, "a"))
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path))
    assert (loaded.eos_id, loaded.vocab_size) == (900, 901)


def without_end_of_text() -> Tokenizer:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_tokens([AddedToken("b")])
    return backend


def test_no_end_of_text(tmp_path: Path, refused) -> None:
    without_end_of_text().save(str(tmp_path / "tokenizer.json"))
    assert "no end-of-text token" in refused(load_tokenizer, str(tmp_path))
    assert "no end-of-text token" in refused(
        load_tokenizer, pretrained_folder(tmp_path / "saved", without_end_of_text())
    )


@pytest.mark.parametrize("content", ["", "{}", "not\njson", '{"model": 1}'])
def test_damaged_tokenizer_json(tmp_path: Path, content: str, refused) -> None:
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8")
    assert "cannot be loaded" in refused(load_tokenizer, str(tmp_path / "tokenizer.json"))
    assert "cannot be loaded" in refused(load_tokenizer, str(tmp_path))


def test_unknown_name(monkeypatch: pytest.MonkeyPatch, refused) -> None:
    pytest.importorskip("transformers")
    monkeypatch.setattr(tokenizer, "hub_is_reachable", lambda: False)
    message = refused(load_tokenizer, "nobody/no-such-tokenizer")
    assert "nobody/no-such-tokenizer" in message
    assert "the hub cannot be reached" in message
    assert "bpe, gpt2, or a folder" in message


def test_empty_folder(tmp_path: Path, refused) -> None:
    pytest.importorskip("transformers")
    assert "cannot be loaded" in refused(load_tokenizer, str(tmp_path))


def test_code_in_a_folder_is_not_run(tmp_path: Path, refused) -> None:
    pytest.importorskip("transformers")
    marker = tmp_path / "was-run"
    folder = tmp_path / "tok"
    folder.mkdir()
    (folder / "own.py").write_text(
        f"open({str(marker)!r}, 'w')\nclass Own: pass\n", encoding="utf-8"
    )
    config = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    refused(load_tokenizer, str(folder))
    assert not marker.exists()


LONG_TEXTS = {
    "one letter": "a" * 5000,
    "a genome": "".join(random.Random(0).choices("ACGT", k=7321)),
    "after a space": "the word " + "x" * 2001 + " and more\n",
    "digits": "1" * 3000 + " 2\n",
    "digits of several kinds": "1²½" * 1000 + " 2\n",
    "spaces": "a" + " " * 2500 + "b",
    "others": "_" * 1500 + "-" * 1500 + "\x1c" * 1500,
    "twice": "x" * 1001 + "\n" + "y" * 1999,
    "ideographs": "漢字" * 1700 + "。",
}
SHORT_WORDS = {
    "lines": "the quick brown fox\r\n\t jumps -- over\x1c the\xa0lazy dog's  \n  tail\n" * 60,
    "no spaces": "x=[1,2,3];don't('s');" * 200,
    "hexadecimal": random.Random(0).randbytes(3000).hex(),
    "ideographs": "記憶は鍵と値である、鍵1つに値が²つ。" * 200,
    "many spaces": (" " * 97 + "a" + "\n" * 7) * 40,
    "accents": "e\u0301x" * 1500,
    "contractions": "'re" * 1400,
    "up to the limit": (
        f"the{' ' + 'x' * (LONGEST_WORD - 1)} {'1' * (LONGEST_WORD - 1)}\n{'-' * LONGEST_WORD}"
    ),
}


def words(text: str) -> list[str]:
    """What the byte-level pre-tokenizer makes of a text."""
    return [text[start:end] for _, (start, end) in BYTE_LEVEL.pre_tokenize_str(text)]


@pytest.mark.parametrize("name", LONG_TEXTS)
def test_a_trainer_sees_no_long_word(name: str) -> None:
    text = LONG_TEXTS[name]
    pieces = list(trainable([text]))
    assert "".join(pieces) == text
    assert max(map(len, words(text))) > LONGEST_WORD
    assert max(map(len, pieces)) <= LONGEST_WORD
    assert len(pieces) < len(text) / LONGEST_WORD + 6, "short ones take longer"
    assert has_long_word(["short", text])


@pytest.mark.parametrize("name", SHORT_WORDS)
def test_a_trainer_sees_words_up_to_the_limit_as_they_are(name: str) -> None:
    text = SHORT_WORDS[name]
    pieces = list(trainable([text, text]))
    assert "".join(pieces) == text * 2
    assert max(map(len, pieces)) <= LONGEST_WORD < len(text)
    assert [word for piece in pieces for word in words(piece)] == words(text) * 2
    assert not has_long_word([text])
    backend = byte_level(models.BPE())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([text, text], trainer)
    uncut = TextTokenizer(backend, 0, "uncut")
    assert load_tokenizer("bpe", [text, text], 300).backend.to_str() == uncut.backend.to_str()


@pytest.mark.parametrize(("length", "whole"), [(LONGEST_WORD, True), (LONGEST_WORD + 1, False)])
@pytest.mark.parametrize("letter", ["x", "1", "-", "\n", "漢", "²"])
@pytest.mark.parametrize("after", ["", " ", "\n ", "'s", "é", "7"])
def test_the_limit(letter: str, length: int, whole: bool, after: str) -> None:
    text = letter * length + after
    longest = max(map(len, words(text)))
    assert has_long_word([text]) == (longest > LONGEST_WORD)
    if not after:
        assert (longest <= LONGEST_WORD) == whole


@settings(max_examples=200, deadline=None, derandomize=True, database=None)
@given(st.text(st.sampled_from("abs19²½'_-. \t\n\x1c\xa0é漢。\u0301\u200b"), max_size=200))
def test_pieces_are_words_of_any_text(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "LONGEST_WORD", 12)
        pieces = list(trainable([text]))
        assert has_long_word([text]) == (max(map(len, words(text)), default=0) > 12)
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= 12 for piece in pieces)
    if max(map(len, words(text)), default=0) <= 12:
        assert [word for piece in pieces for word in words(piece)] == words(text)


def test_of_long_words_a_trainer_sees_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "LONG_CHARACTERS", 4500)
    # Their last pieces count as well: a text may have many words of hardly above the limit.
    pieces = list(
        trainable(["a" * 3000 + " end", "1" * 1700 + ". end"] + ["?" * 1100 + " end"] * 9)
    )
    assert [sum(piece.count(sign) for piece in pieces) for sign in "a1?"] == [3000, 1500, 0]
    assert sum(piece.count(" end") for piece in pieces) == 11
    assert sum(map(len, pieces)) == 4500 + 11 * len(" end") + 1


@pytest.mark.parametrize("name", LONG_TEXTS)
def test_a_long_word_is_encoded_whole_and_comes_back(name: str) -> None:
    text = LONG_TEXTS[name]
    trained = load_tokenizer("bpe", [text], 300)
    ((ids, ends),) = trained.encode_batch_with_ends([text])
    assert trained.encode_batch([text]) == [ids]
    assert trained.decode(ids) == text
    assert trained.backend.encode(text).ids == ids
    counts = bytes_of_tokens(text, ends, len(ids))
    assert ends[-1] == len(text)
    assert counts.min() >= 0
    assert counts.sum() == len(text.encode())


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_training_is_shown_on_a_terminal_only(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    silent = load_tokenizer("bpe", TEXTS, 300)
    assert capfd.readouterr() == ("", "")
    shown = Terminal()
    monkeypatch.setattr(sys, "stderr", shown)
    assert load_tokenizer("bpe", TEXTS, 300).backend.to_str() == silent.backend.to_str()
    assert f"{sum(map(len, TEXTS))} characters" in shown.getvalue()
    assert capfd.readouterr() == ("", "")
