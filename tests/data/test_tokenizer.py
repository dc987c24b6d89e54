"""Tokenizers: the trained one, the genuine GPT-2 one, and pretrained ones out of folders."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors

from mka.data import Corpus, TextTokenizer, load_tokenizer, tokenizer
from mka.data.tokenizer import END_OF_TEXT, LONG_WORD, LONGEST_WORD, trainable

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
    "spaces": "a" + " " * 2500 + "b",
    "underscores": "_" * 1500 + "-" * 1500,
    "twice": "x" * 1001 + "\n" + "y" * 1999,
}


@pytest.mark.parametrize("name", LONG_TEXTS)
def test_a_trainer_sees_no_long_word(name: str) -> None:
    text = LONG_TEXTS[name]
    pieces = list(trainable([text]))
    assert "".join(pieces) == text
    assert len(pieces) > 1
    assert not any(LONG_WORD.search(piece) for piece in pieces)


@pytest.mark.parametrize("length", [LONGEST_WORD - 1, LONGEST_WORD])
def test_words_up_to_the_limit_are_not_cut(length: int) -> None:
    text = "the " + "x" * length + " " + "1" * length + "\n" + "-" * length
    assert list(trainable([text, "more"])) == [text, "more"]


def test_of_long_words_a_trainer_sees_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mka.data.tokenizer.LONG_CHARACTERS", 4500)
    pieces = list(trainable(["a" * 3000 + " end", "b " + "c" * 3000 + " end", "d" * 2000]))
    assert sum(piece.count("a") for piece in pieces) == 3000
    assert sum(piece.count("c") for piece in pieces) == 1500
    assert sum(piece.count("d") for piece in pieces) <= 2, "of the words end"
    assert sum(piece.count(" end") for piece in pieces) == 2


@pytest.mark.parametrize("name", LONG_TEXTS)
def test_a_long_word_is_encoded_whole_and_comes_back(name: str) -> None:
    text = LONG_TEXTS[name]
    tokenizer = load_tokenizer("bpe", [text], 300)
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text
