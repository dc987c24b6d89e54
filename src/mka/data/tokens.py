"""Documents to token files, kept between runs.

cache_dir/<key>/tokenizer.json      the tokenizer
                <split>.ids         token ids, uint16 or uint32, little-endian,
                                    documents end to end
                <split>.bytes       validation, test: UTF-8 bytes of text per token,
                                    uint32
                manifest.json       sizes, checksums and counts, written last
"""

import hashlib
import json
import os
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import Tokenizer

from mka.data.cache import default_cache_dir, read_entry, write_entry
from mka.data.corpus import SPLITS, Corpus
from mka.data.encoding import bytes_of_tokens, encoded_pieces
from mka.data.tokenizer import (
    LONG_CHARACTERS,
    LONGEST_WORD,
    TextTokenizer,
    counting,
    has_long_word,
    load_tokenizer,
)

FORMAT = 1
"""Version of the files, a part of the key: files of another version are not found."""
MEASURED_SPLITS = ("validation", "test")
"""Splits whose losses are also reported per byte."""
TOKENIZER_FILE = "tokenizer.json"
BYTES_DTYPE = np.dtype("<u4")


@dataclass(frozen=True)
class TokenSplit:
    """The token files of one split, memory-mapped.

    Args:
        ids: (N,) token ids.
        token_bytes: (N,) UTF-8 bytes of text per token. None for train.
    """

    ids: np.ndarray
    token_bytes: np.ndarray | None


@dataclass(frozen=True)
class TokenizedCorpus:
    """The token files of a corpus.

    Args:
        tokenizer: the tokenizer.
        splits: "train", "validation" and "test".
        fingerprint: the cache key, a sha256 (hex) of all that the files depend on.
        summary: a description that can be written as JSON, for the record of a run.
    """

    tokenizer: TextTokenizer
    splits: dict[str, TokenSplit]
    fingerprint: str
    summary: dict[str, Any]


def prepare_tokens(
    corpus: Corpus,
    tokenizer_spec: str,
    vocab_size: int,
    cache_dir: str | os.PathLike[str] | None = None,
) -> TokenizedCorpus:
    """Tokenize every split, or open the files of an earlier run with the same text,
    tokenizer and parameters. Each document is followed by the end-of-text token.

    Args:
        corpus: the text.
        tokenizer_spec: what `load_tokenizer` takes.
        vocab_size: V of tokenizer "bpe", at most; not used for others.
        cache_dir: the folder of the cache. Default: None, `default_cache_dir()`.

    Raises InputError for a tokenizer that cannot be loaded and for a cache that cannot
    be written.
    """
    # A pretrained tokenizer is loaded before the cache is consulted, because its
    # content is a part of the key: tomorrow the same name may mean another one.
    pretrained = None if tokenizer_spec == "bpe" else load_tokenizer(tokenizer_spec)
    key = cache_key(corpus, pretrained, vocab_size)
    folder = Path(cache_dir or default_cache_dir()) / key
    details = read_entry(folder)
    if details is None:
        write_entry(folder, partial(write_tokens, corpus, pretrained, vocab_size))
        details = read_entry(folder)
    if details is None:
        raise RuntimeError(f"{folder} was damaged as soon as it was written")
    return open_tokens(folder, corpus, tokenizer_spec, details)


def cache_key(corpus: Corpus, pretrained: TextTokenizer | None, vocab_size: int) -> str:
    """The sha256 (hex) of everything that the token files depend on; `pretrained` None:
    "bpe" of `vocab_size`."""
    if pretrained is None:
        tokenizer = f"bpe {vocab_size}"
        # Only then does the tokenizer depend on how words are cut for the trainer.
        if has_long_word(text for _, text in corpus.documents["train"]):
            tokenizer += f" {LONGEST_WORD} {LONG_CHARACTERS}"
    else:
        definition = f"{pretrained.eos_id} {pretrained.backend.to_str()}"
        tokenizer = hashlib.sha256(definition.encode()).hexdigest()
    # Another release of the package tokenizers may encode differently.
    parts = [FORMAT, corpus.fingerprint, tokenizer, tokenizers.__version__]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def write_tokens(
    corpus: Corpus, pretrained: TextTokenizer | None, vocab_size: int, folder: Path
) -> dict[str, Any]:
    """Write the files of all splits into `folder`; returns what is needed to open them.

    pretrained: the tokenizer. None: a "bpe" of `vocab_size` is trained on the training
        split.
    """
    train_texts = (text for _, text in corpus.documents["train"])
    tokenizer = pretrained or load_tokenizer("bpe", train_texts, vocab_size)
    (folder / TOKENIZER_FILE).write_text(tokenizer.backend.to_str(), encoding="utf-8")
    # Half the space, if all ids fit.
    dtype = "<u2" if tokenizer.vocab_size <= 2**16 else "<u4"
    counts = {
        split: write_split(corpus.documents[split], tokenizer, dtype, folder, split)
        for split in SPLITS
    }
    return {
        "dtype": dtype,
        "eos_id": tokenizer.eos_id,
        "vocab_size": tokenizer.vocab_size,
        "counts": counts,
    }


def write_split(
    documents: list[tuple[str, str]], tokenizer: TextTokenizer, dtype: str, folder: Path, split: str
) -> dict[str, int]:
    """Encode one split into its file of token ids (of `dtype`) and, if its losses are
    reported per byte, its file of bytes per token; returns the counts of documents,
    tokens and bytes."""
    measured = split in MEASURED_SPLITS
    num_tokens = num_bytes = 0
    # Written piece by piece, because a split may not fit into memory.
    with ExitStack() as stack:
        ids_file = stack.enter_context((folder / f"{split}.ids").open("wb"))
        bytes_file = (
            stack.enter_context((folder / f"{split}.bytes").open("wb")) if measured else None
        )
        total = sum(len(text) for _, text in documents)
        count = stack.enter_context(counting(f"Encoding {split}", total))
        for text, ids, ends in encoded_pieces(documents, tokenizer, measured):
            ids_file.write(np.array(ids, dtype=dtype).tobytes())
            if bytes_file:
                bytes_file.write(
                    bytes_of_tokens(text, ends, len(ids)).astype(BYTES_DTYPE).tobytes()
                )
            num_tokens += len(ids)
            num_bytes += len(text.encode())
            count(len(text))
    return {"documents": len(documents), "tokens": num_tokens, "bytes": num_bytes}


def open_tokens(
    folder: Path, corpus: Corpus, tokenizer_spec: str, details: dict[str, Any]
) -> TokenizedCorpus:
    """Map the files of a checked cache folder, written with these details, into
    memory."""
    backend = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    splits = {
        split: TokenSplit(
            map_file(folder / f"{split}.ids", np.dtype(details["dtype"])),
            map_file(folder / f"{split}.bytes", BYTES_DTYPE) if split in MEASURED_SPLITS else None,
        )
        for split in SPLITS
    }
    summary = {
        "dataset": corpus.name,
        "corpus_fingerprint": corpus.fingerprint,
        "split_rule": corpus.split_rule,
        "skipped": corpus.skipped,
        "origin": corpus.origin,
        "tokenizer": tokenizer_spec,
        "vocab_size": details["vocab_size"],
        "splits": details["counts"],
    }
    tokenizer = TextTokenizer(backend, details["eos_id"], tokenizer_spec)
    return TokenizedCorpus(tokenizer, splits, folder.name, summary)


def map_file(path: Path, dtype: np.dtype) -> np.ndarray:
    """A read-only view of a file as an array (N,)."""
    # An empty file cannot be mapped.
    return np.memmap(path, dtype, mode="r") if path.stat().st_size else np.empty(0, dtype)
