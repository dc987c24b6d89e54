"""Token files: what is in them, and that the bytes add up."""

import hashlib
import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

from mka.data import Corpus, TextTokenizer, encoding, load_tokenizer, prepare_tokens, tokens
from mka.data.corpus import SPLITS
from mka.data.encoding import batches_of_pieces, bytes_of_tokens, encoded_pieces
from mka.data.tokens import cache_key

SPECS = ("bpe", "gpt2")
HARD_TEXTS = [
    "naïve café, déjà vu",
    "漢字かな混じり文 記憶",
    "🎉👩‍👩‍👧🇫🇷 x\u0301\u0302",
    "\ufeffBOM\r\n\ttabs\n\n   \n",
    "<|endoftext|> in the text <|endoftext|>",
    "\u200b",
    "a",
]


def words_only() -> TextTokenizer:
    """A tokenizer that drops spaces and knows hardly any word."""
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "</s>": 2}, "[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return TextTokenizer(backend, 2, "words")


def metaspace() -> TextTokenizer:
    """One that rewrites spaces, puts one in front and falls back to bytes, like many Llama-family
    models."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)} | {
        "</s>": 256,
        "▁": 257,
        "a": 258,
        "▁a": 259,
        "<unk>": 260,
    }
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.ByteFallback()
    return TextTokenizer(backend, 256, "metaspace")


@pytest.fixture(scope="module")
def tokenizers_by_name(small_corpus: Corpus) -> dict[str, TextTokenizer]:
    texts = [text for _, text in small_corpus.documents["train"]]
    return {
        "bpe": load_tokenizer("bpe", texts, 400),
        "gpt2": load_tokenizer("gpt2"),
        "words": words_only(),
        "metaspace": metaspace(),
    }


@pytest.mark.parametrize("spec", SPECS)
def test_documents_end_to_end(spec: str, small_corpus: Corpus, tmp_path: Path) -> None:
    prepared = prepare_tokens(small_corpus, spec, 400, tmp_path)
    eos = prepared.tokenizer.eos_id
    for split, documents in small_corpus.documents.items():
        ids = prepared.splits[split].ids
        assert ids.dtype == np.uint16
        pieces = np.split(ids, np.flatnonzero(ids == eos) + 1)
        assert len(pieces.pop()) == 0
        assert [prepared.tokenizer.decode(piece[:-1].tolist()) for piece in pieces] == [
            text for _, text in documents
        ]


@pytest.mark.parametrize("spec", SPECS)
def test_bytes_of_held_out_splits(spec: str, small_corpus: Corpus, tmp_path: Path) -> None:
    prepared = prepare_tokens(small_corpus, spec, 400, tmp_path)
    assert prepared.splits["train"].token_bytes is None
    for split in ("validation", "test"):
        ids, token_bytes = prepared.splits[split].ids, prepared.splits[split].token_bytes
        assert token_bytes is not None
        assert token_bytes.dtype == np.uint32
        assert len(token_bytes) == len(ids)
        ends = np.flatnonzero(ids == prepared.tokenizer.eos_id)
        assert not token_bytes[ends].any()
        per_document = np.diff(np.cumsum(token_bytes, dtype=np.int64)[ends], prepend=0)
        assert per_document.tolist() == [
            len(text.encode()) for _, text in small_corpus.documents[split]
        ]


def test_summary(small_corpus: Corpus, tmp_path: Path) -> None:
    prepared = prepare_tokens(small_corpus, "bpe", 400, tmp_path)
    summary = prepared.summary
    assert json.loads(json.dumps(summary)) == summary
    assert summary["dataset"] == "text"
    assert summary["tokenizer"] == "bpe"
    assert summary["vocab_size"] == prepared.tokenizer.vocab_size
    assert summary["split_rule"] == "made by hand"
    assert summary["origin"] == {"paths": "nowhere"}
    assert summary["corpus_fingerprint"] == small_corpus.fingerprint
    for split, documents in small_corpus.documents.items():
        assert summary["splits"][split] == {
            "documents": len(documents),
            "tokens": len(prepared.splits[split].ids),
            "bytes": sum(len(text.encode()) for _, text in documents),
        }


def test_large_vocabulary_takes_four_bytes(small_corpus: Corpus, tmp_path: Path) -> None:
    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "</s>": 70_000}, "[UNK]"))
    backend.save(str(tmp_path / "tokenizer.json"))
    prepared = prepare_tokens(small_corpus, str(tmp_path), 0, tmp_path / "cache")
    assert prepared.splits["train"].ids.dtype == np.uint32
    assert prepared.splits["train"].ids.tolist() == [0, 70_000] * 6


def test_token_files_are_read_only(small_corpus: Corpus, tmp_path: Path) -> None:
    ids = prepare_tokens(small_corpus, "bpe", 400, tmp_path).splits["train"].ids
    assert isinstance(ids, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        ids[0] = 1


def test_empty_split(small_corpus: Corpus, tmp_path: Path) -> None:
    corpus = replace(small_corpus, documents=small_corpus.documents | {"test": []})
    for _ in range(2):
        split = prepare_tokens(corpus, "bpe", 400, tmp_path).splits["test"]
        assert split.token_bytes is not None
        assert (len(split.ids), len(split.token_bytes)) == (0, 0)


@pytest.mark.parametrize("name", ["bpe", "gpt2", "words", "metaspace"])
def test_bytes_add_up(name: str, tokenizers_by_name: dict[str, TextTokenizer]) -> None:
    documents = [(str(number), text) for number, text in enumerate([*HARD_TEXTS, "  a  ", "a"])]
    pieces = list(encoded_pieces(documents, tokenizers_by_name[name], with_ends=True))
    assert [text for text, _, _ in pieces] == [text for _, text in documents]
    for text, ids, ends in pieces:
        counts = bytes_of_tokens(text, ends, len(ids))
        assert len(counts) == len(ids)
        assert counts.min() >= 0
        assert counts.sum() == len(text.encode())


@pytest.mark.parametrize("name", SPECS)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60))
def test_bytes_add_up_for_any_text(
    name: str, text: str, tokenizers_by_name: dict[str, TextTokenizer]
) -> None:
    ((ids, ends),) = tokenizers_by_name[name].encode_batch_with_ends([text])
    counts = bytes_of_tokens(text, ends, len(ids) + 1)
    assert counts[-1] == 0
    assert counts.sum() == len(text.encode())
    assert tokenizers_by_name[name].decode(ids) == text


def test_bytes_of_each_token(tokenizers_by_name: dict[str, TextTokenizer]) -> None:
    gpt2 = tokenizers_by_name["gpt2"]
    ((ids, ends),) = gpt2.encode_batch_with_ends(["Hello é world\n\n  x"])
    assert [gpt2.decode([token]) for token in ids] == ["Hello", " é", " world", "\n\n", " ", " x"]
    assert bytes_of_tokens("Hello é world\n\n  x", ends, len(ids)).tolist() == [5, 3, 6, 2, 1, 2]


def test_bytes_of_a_character_in_several_tokens(
    tokenizers_by_name: dict[str, TextTokenizer],
) -> None:
    ((ids, ends),) = tokenizers_by_name["gpt2"].encode_batch_with_ends(["a漢b"])
    assert len(ids) == 5
    assert bytes_of_tokens("a漢b", ends, len(ids)).tolist() == [1, 3, 0, 0, 1]


def test_bytes_of_tokens_whose_ends_step_back() -> None:
    assert bytes_of_tokens("abcdé", [3, 2, 4], 4).tolist() == [3, 0, 3, 0]


def test_bytes_that_the_tokenizer_skips() -> None:
    ((ids, ends),) = words_only().encode_batch_with_ends([" a  é a  "])
    assert len(ids) == 3
    assert bytes_of_tokens(" a  é a  ", ends, 4).tolist() == [2, 4, 4, 0]
    assert bytes_of_tokens("   ", [], 1).tolist() == [3]
    assert bytes_of_tokens("", [], 1).tolist() == [0]
    assert bytes_of_tokens("", [], 0).tolist() == []


def test_long_documents_are_encoded_in_pieces(
    monkeypatch: pytest.MonkeyPatch, small_corpus: Corpus
) -> None:
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 100)
    monkeypatch.setattr(encoding, "BATCH_CHARACTERS", 250)
    texts = [text for _, text in small_corpus.documents["validation"]] + ["x" * 350, "y" * 100, "z"]
    batches = list(batches_of_pieces(texts))
    assert all(sum(len(piece) for piece, _ in batch) < 350 for batch in batches)
    joined = [""]
    for piece, is_last in (pair for batch in batches for pair in batch):
        assert 0 < len(piece) <= 100
        assert is_last or piece.endswith("\n") or set(piece) == {"x"}
        joined[-1] += piece
        if is_last:
            joined.append("")
    assert joined == [*texts, ""]


def test_pieces_lose_no_text(
    monkeypatch: pytest.MonkeyPatch, small_corpus: Corpus, tmp_path: Path
) -> None:
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 64)
    prepared = prepare_tokens(small_corpus, "gpt2", 0, tmp_path)
    for split, documents in small_corpus.documents.items():
        decoded = prepared.tokenizer.decode(prepared.splits[split].ids.tolist())
        assert decoded == "".join(text + "<|endoftext|>" for _, text in documents)
        assert prepared.summary["splits"][split]["bytes"] == sum(
            len(text.encode()) for _, text in documents
        )
    assert prepared.splits["test"].token_bytes is not None
    assert prepared.splits["test"].token_bytes.sum() == prepared.summary["splits"]["test"]["bytes"]


def test_training_sees_the_train_split_only(small_corpus: Corpus, tmp_path: Path) -> None:
    changed = replace(
        small_corpus, documents=small_corpus.documents | {"test": [("t", "zyzzyva " * 500)]}
    )
    first, second = (
        prepare_tokens(corpus, "bpe", 400, tmp_path) for corpus in (small_corpus, changed)
    )
    assert first.tokenizer.backend.to_str() == second.tokenizer.backend.to_str()


def test_key_is_everything_it_depends_on(
    small_corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tok").mkdir()
    load_tokenizer("bpe", ["aaaa bbbb"], 260).backend.save(str(tmp_path / "tok" / "tokenizer.json"))
    other = replace(small_corpus, documents=small_corpus.documents | {"test": []})

    def key(corpus: Corpus, spec: str, vocab_size: int = 400) -> str:
        return prepare_tokens(corpus, spec, vocab_size, tmp_path / "cache").fingerprint

    folder = str(tmp_path / "tok")
    keys = [
        key(small_corpus, "bpe"),
        key(other, "bpe"),
        key(small_corpus, "bpe", 401),
        key(small_corpus, folder),
    ]
    load_tokenizer("bpe", ["cccc dddd"], 260).backend.save(str(tmp_path / "tok" / "tokenizer.json"))
    keys.append(key(small_corpus, folder))
    monkeypatch.setattr(tokens.tokenizers, "__version__", "0.0.0")
    keys.append(key(small_corpus, "bpe"))
    monkeypatch.setattr(tokens, "FORMAT", tokens.FORMAT + 1)
    keys.append(key(small_corpus, "bpe"))
    assert len(set(keys)) == len(keys)


def test_key_holds_the_cut_of_long_words_where_one_is_cut(
    small_corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordinary, pretrained = small_corpus, load_tokenizer("gpt2")
    long = replace(ordinary, documents=ordinary.documents | {"train": [("x", "x" * 1001)]})
    # What is not trained on does not count.
    held_out = replace(ordinary, documents=ordinary.documents | {"test": [("x", "x" * 1001)]})

    def keys() -> list[str]:
        return [
            cache_key(long, None, 400),
            cache_key(ordinary, None, 400),
            cache_key(held_out, None, 400),
            cache_key(long, pretrained, 400),
        ]

    before = keys()
    monkeypatch.setattr(tokens, "LONG_CHARACTERS", 500)
    other = keys()
    monkeypatch.setattr(tokens, "LONGEST_WORD", 500)
    assert len({before[0], other[0], keys()[0]}) == 3
    assert before[1:] == other[1:] == keys()[1:]
    parts = [1, ordinary.fingerprint, "bpe 400", tokenizers.__version__]
    assert before[1] == hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def test_encoding_is_shown_on_a_terminal_only(
    small_corpus: Corpus,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    silent = prepare_tokens(small_corpus, "gpt2", 0, tmp_path / "silent")
    shown = io.StringIO()
    monkeypatch.setattr(shown, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stderr", shown)
    again = prepare_tokens(small_corpus, "gpt2", 0, tmp_path / "shown")
    assert again.splits["train"].ids.tolist() == silent.splits["train"].ids.tolist()
    for split in SPLITS:
        assert f"Encoding {split}" in shown.getvalue()
    assert capfd.readouterr() == ("", "")


def test_import_loads_neither_transformers_nor_datasets() -> None:
    code = (
        "import sys, mka.data; print({'transformers', 'datasets', 'huggingface_hub'} & "
        "set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "set()"
