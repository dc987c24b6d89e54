"""What a model recalls: MQAR by shape, a passkey by length and depth.

An answer is correct if each of its tokens is the likeliest one after those before it,
which is what greedy decoding would write.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from transformers import DynamicCache

from mka.data import load_corpus
from mka.data.needle import FILLER, Passkey, PasskeyTask
from mka.data.recall import NOT_ASKED, RecallBatch, recall_batch
from mka.data.tokenizer import TextTokenizer, with_end_of_text
from mka.errors import InputError, check_whole
from mka.memory.options import LongTermConfig
from mka.models import CACHE_ARGUMENT, mechanisms, memory_cache, read_in_pieces, states

ROWS = 32
"""Rows of MQAR that the model reads at once."""
TEXT_TOKENS = 2**20
"""Tokens of text around a passkey, after which the text is repeated."""


@dataclass(frozen=True)
class Score:
    """The score for one kind of prompt.

    Attributes:
        task: recall or needle.
        tokens: the length of a prompt, in tokens.
        kind: the number of pairs (recall) or the depth (needle).
        correct: the number of correct answers.
        asked: the number of answers asked for.
        seconds: the time for reading and answering all prompts.
        memory_bytes: the size of the model's cache after one prompt; 0 for recall,
            which keeps none.
    """

    task: str
    tokens: int
    kind: str
    correct: int
    asked: int
    seconds: float
    memory_bytes: int

    @property
    def accuracy(self) -> float:
        """The share of the answers that are correct."""
        return self.correct / self.asked


def recall_scores(
    model: Any,
    shapes: Sequence[tuple[int, int]] = ((64, 4), (128, 8), (256, 16)),
    *,
    samples: int = 256,
    seed: int = 0,
    longterm: LongTermConfig | None = None,
) -> Iterator[Score]:
    """Test MQAR (arXiv 2312.04927); yields one score per shape, each as soon as it is
    known.

    Args:
        model: a causal language model of transformers.
        shapes: pairs of numbers: tokens per row, and pairs stated in it.
        samples: rows per shape.
        seed: random seed for the rows.
        longterm: where to keep the model's long-term memory; None: on the device.

    Raises InputError for a number out of range.
    """
    longterm = longterm or LongTermConfig()
    check_whole("samples", samples, 1)
    check_whole("seed", seed, 0)
    for tokens, pairs in shapes:
        begun, correct, asked = time.perf_counter(), 0, 0
        for start in range(0, samples, ROWS):
            rows = min(ROWS, samples - start)
            # Seeded by what the rows are, so that a shape's rows do not depend on the
            # others.
            batch = recall_batch(
                tokens, pairs, rows, (seed, tokens, start), model.config.vocab_size
            )
            found, due = recalled(model, batch, longterm)
            correct, asked = correct + found, asked + due
        yield Score("recall", tokens, str(pairs), correct, asked, time.perf_counter() - begun, 0)


@torch.no_grad()
def recalled(model: Any, batch: RecallBatch, longterm: LongTermConfig) -> tuple[int, int]:
    """The number of correct answers, and the number of answers asked for, in one
    batch."""
    # Without a special place for the long-term memory no cache is needed: rows are read
    # at once.
    cache = memory_cache(model, longterm) if longterm.is_special else None
    logits = model(
        batch.tokens.to(model.device), use_cache=cache is not None, **{CACHE_ARGUMENT: cache}
    ).logits
    due = batch.targets != NOT_ASKED
    predicted = logits.argmax(-1).cpu()[due]
    return int((predicted == batch.targets[due]).sum()), int(due.sum())


def needle_scores(
    model: Any,
    tokenizer: Any,
    lengths: Sequence[int] = (1024, 4096),
    depths: Sequence[float] = (0.0, 0.25, 0.5, 0.75, 1.0),
    *,
    surroundings: Literal["filler", "stdlib", "text"] = "filler",
    text_path: Sequence[str] = (),
    samples: int = 1,
    seed: int = 0,
    piece: int = 4096,
    longterm: LongTermConfig | None = None,
    name: str = "the model",
) -> Iterator[Score]:
    """Ask for a passkey in a long text; yields one score per length and depth when it
    is known.

    Args:
        model: a causal language model of transformers.
        tokenizer: the model's fast tokenizer.
        lengths: lengths of the prompts, in tokens.
        depths: where the key is stated: 0 at the beginning, 1 right before the
            question.
        surroundings: the text around the key: the same few sentences (filler), Python's
            standard library (stdlib), or the files and folders of `text_path` (text).
        samples: prompts per length and depth.
        seed: random seed for the prompts.
        piece: tokens to read at a time.
        longterm: where to keep the model's long-term memory; None: on the device.
        name: the model's name, for error messages.

    Raises InputError for surroundings without a token, and for a tokenizer without an
    end of text.
    """
    longterm = longterm or LongTermConfig()
    for option, value, least in (("samples", samples, 1), ("seed", seed, 0), ("piece", piece, 1)):
        check_whole(option, value, least)
    for length in lengths:
        check_whole("lengths", length, 1)
    # The tokenizer's backend, because a prompt is pieced together from ids without
    # special tokens.
    backend = with_end_of_text(tokenizer.backend_tokenizer, tokenizer.eos_token_id, name)
    around = text_around(backend, surroundings, text_path)
    task = PasskeyTask(around, lambda text: backend.encode_batch([text])[0])
    for length in lengths:
        for depth in depths:
            begun, correct, held = time.perf_counter(), 0, 0
            for sample in range(samples):
                passkey = task.prompt(length, depth, (seed, length, round(1000 * depth), sample))
                right, held = answered(model, passkey, longterm, piece)
                correct += right
            taken = time.perf_counter() - begun
            yield Score("needle", length, f"{depth:g}", correct, samples, taken, held)


def text_around(
    tokenizer: TextTokenizer, surroundings: str, text_path: Sequence[str]
) -> np.ndarray:
    """The token ids (N,) of the surroundings, of about TEXT_TOKENS at most.

    Raises InputError if there are none.
    """
    documents = [FILLER]
    if surroundings != "filler":
        # Of the standard library only the test split, which no model here has trained
        # on.
        splits = load_corpus(surroundings, tuple(text_path)).documents
        wanted = [splits["test"]] if surroundings == "stdlib" else splits.values()
        documents = [text for split in wanted for _, text in split]
    ids: list[int] = []
    for text in documents:
        ids += tokenizer.encode_batch([text])[0]
        if len(ids) > TEXT_TOKENS:
            break
    if not ids:
        raise InputError(f"text_path is {' '.join(text_path)!r}; it holds no token")
    return torch.tensor(ids).numpy()


@torch.no_grad()
def answered(
    model: Any, passkey: Passkey, longterm: LongTermConfig, piece: int
) -> tuple[bool, int]:
    """Whether the model writes the key, and the bytes of its cache after reading the
    prompt."""
    prompt, answer = (torch.from_numpy(part)[None] for part in (passkey.prompt, passkey.answer))
    # A model without mka's layers has transformers' own cache.
    cache: Any = (
        memory_cache(model, longterm)
        if mechanisms(model) or longterm.is_special
        else DynamicCache()
    )
    first = read_in_pieces(model, prompt, cache, piece)
    held = sum(state.nbytes for state in states(cache))
    # The true answer is read in one go: a token counts only if it is the likeliest
    # after the true ones before it, and all of them count only if greedy decoding would
    # have written the same.
    rest = model(answer[:, :-1].to(model.device), use_cache=True, **{CACHE_ARGUMENT: cache}).logits
    predicted = torch.cat([first[:, None], rest], dim=1).argmax(-1).cpu()
    return bool((predicted == answer).all()), held
