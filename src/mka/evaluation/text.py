"""How well a model predicts whole documents, in units that are always named.

    document  [end of text] t_0 t_1 ... t_n-1      each t_i is predicted once, from at most `max_length` tokens before
    windows   |-- max_length --|                   the first predicts all of its tokens,
                   |-- max_length --|              each later one the `stride` tokens that come anew

With `stride` = `max_length` these are lm-eval's rolling windows, and the sums its word_perplexity, byte_perplexity and
bits_per_byte (words: what white space parts; bytes: of UTF-8).
"""

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mka.commands import PerplexityConfig, TextConfig
from mka.data import load_corpus
from mka.limits import InputError
from mka.loading import load
from mka.statistics import Estimate, ratio, verdict
from mka.storage import write_atomically

Say = Callable[[str], None]
FIRST_EDGE, EDGE_GROWTH = 64, 4
SHOWN_IN_FULL = 1e6
DEFAULT_LENGTH = 1024
"""Tokens of a window where a model does not say how many it takes."""


@dataclass(frozen=True)
class DocumentScores:
    """Sums of each document (N,), and the nats of each token of the long ones' first windows (L, max_length)."""

    nats: np.ndarray
    tokens: np.ndarray
    words: np.ndarray
    num_bytes: np.ndarray
    long: np.ndarray

    def figures(self) -> dict[str, tuple[str, Estimate]]:
        """By name: the unit, and the value with its interval."""
        token, word = ratio(self.nats, self.tokens), ratio(self.nats, self.words)
        return {
            "loss": ("nats per token", token),
            "token_perplexity": ("per token of this tokenizer", Estimate(*map(exp, token))),
            "word_perplexity": ("per word", Estimate(*map(exp, word))),
            "bits_per_byte": ("comparable between tokenizers", ratio(self.nats / math.log(2), self.num_bytes)),
        }


class Window(NamedTuple):
    """Inputs [begin, end) of a document's tokens, an end of text before them; [first, end) are predicted by it."""

    begin: int
    first: int
    end: int


def exp(x: float) -> float:
    """Infinity where a perplexity is beyond every number; NaN, an interval that is not there, stays NaN."""
    return math.inf if x > 709 else math.exp(x)


def windows(num_tokens: int, max_length: int, stride: int) -> Iterator[Window]:
    first, end = 0, min(max_length, num_tokens)
    while first < num_tokens:
        yield Window(max(0, end - max_length), first, end)
        first, end = end, min(num_tokens, end + stride)


def score_text(config: PerplexityConfig, say: Say) -> None:
    """Print the table. Raises InputError for a model that cannot be loaded and for windows that it cannot take."""
    documents = chosen_documents(config)
    model, tokenizer = load(config.model)
    scores = score_documents(model, tokenizer, documents, config)
    of = f"{config.dataset}, {config.split} split: {len(scores.nats):,} documents"
    size = f"{scores.tokens.sum():,} tokens, {scores.words.sum():,} words, {scores.num_bytes.sum():,} bytes"
    say(f"{of}, {size}")
    length = window_length(model, config)
    say(f"windows of {length:,} tokens, {config.stride or length:,} predicted in each but the first")
    for name, (unit, estimate) in scores.figures().items():
        say(f"{name.replace('_', ' '):<17} {shown(estimate)}  {unit}")
    if len(scores.nats) == 1:
        say("one document: no interval can be computed, it takes two or more")
    rows = {name: estimate.record() for name, (_, estimate) in scores.figures().items()}
    positions = list(by_position(scores.long))
    if positions:
        say(f"loss by position, in the {len(scores.long)} documents of {length:,} tokens or more, nats per token:")
    for begin, end, estimate in positions:
        say(f"{f'{begin:,} to {end - 1:,}':<17} {shown(estimate)}")
    found = {"model": config.model, "dataset": config.dataset, "split": config.split, "windows": length}
    sums = {"documents": len(scores.nats), "tokens": int(scores.tokens.sum()), "bytes": int(scores.num_bytes.sum())}
    by_range = [[begin, end, *estimate.record().values()] for begin, end, estimate in positions]
    found |= {**sums, **rows, "by_position": by_range}
    if config.baseline is not None:
        found["difference"] = compare(scores, config, documents, say)
    if config.output is not None:
        write_atomically(Path(config.output), json.dumps(found) + "\n")


def compare(scores: DocumentScores, config: PerplexityConfig, documents: Sequence[str], say: Say) -> dict[str, Any]:
    """The same documents with another model: the difference in bits per byte, document by document."""
    other = score_documents(*load(str(config.baseline)), documents, config)
    nats = (scores.nats - other.nats) / math.log(2)
    difference = ratio(nats, scores.num_bytes)
    word = verdict(difference)
    say(f"against {config.baseline}: {shown(difference, signed=True)}  bits per byte, {word}")
    return {"baseline": config.baseline, "verdict": word, **difference.record()}


def shown(estimate: Estimate, *, signed: bool = False) -> str:
    sign = "+" if signed else ""
    value, low, high = (
        "above 1e308" if x == math.inf else f"{x:{sign},.4f}" if abs(x) < SHOWN_IN_FULL else f"{x:{sign}.3e}"
        for x in estimate
    )
    return f"{value:>12}  ({f'{low} to {high}' if estimate.has_interval else 'no interval'})"


def chosen_documents(config: TextConfig) -> list[str]:
    splits = load_corpus(config.dataset, config.text_path).documents
    documents = [text for _, text in splits[config.split] if text.strip()]
    if not documents:
        raise InputError(f"split is {config.split!r}; it is empty in {config.dataset}")
    return documents


def window_length(model: Any, config: PerplexityConfig) -> int:
    """Raises InputError for more tokens than learned positions reach, and for a stride beyond the window."""
    takes = getattr(model.config, "max_position_embeddings", None) or DEFAULT_LENGTH
    length = config.max_length or takes
    if length > takes and not getattr(model.config, "rope_parameters", None):
        raise InputError(f"max_length is {length}; this model has positions for {takes} tokens")
    if config.stride is not None and config.stride > length:
        raise InputError(f"stride is {config.stride}; a window has {length} tokens")
    return length


@torch.no_grad()
def score_documents(model: Any, tokenizer: Any, documents: Sequence[str], config: PerplexityConfig) -> DocumentScores:
    """In order, until `max_tokens` are scored; a document is never cut."""
    length = window_length(model, config)
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if begin is None:
        raise InputError(f"model is {config.model!r}; its tokenizer has no token that begins a text")
    nats, sizes, long = [], [], []
    for text in documents:
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if not ids:
            continue
        stream = torch.tensor([begin, *ids])
        parts = [*windows(len(ids), length, config.stride or length)]
        losses = torch.cat([*token_losses(model, stream, parts, config.batch_size)])
        nats.append(losses.sum().item())
        sizes.append((len(ids), len(re.split(r"\s+", text)), len(text.encode())))
        if len(ids) >= length:
            long.append(losses[:length].numpy())
        if config.max_tokens is not None and sum(tokens for tokens, _, _ in sizes) >= config.max_tokens:
            break
    if not nats:
        raise InputError(f"split is {config.split!r}; its documents hold no token")
    tokens, words, num_bytes = np.array(sizes).T
    return DocumentScores(np.array(nats), tokens, words, num_bytes, np.array(long).reshape(len(long), length))


def token_losses(model: Any, stream: Tensor, parts: Sequence[Window], batch_size: int) -> Iterator[Tensor]:
    """Nats (end - first,) float64 of each window's tokens; windows are filled up at the right, which no token sees."""
    for start in range(0, len(parts), batch_size):
        group = parts[start : start + batch_size]
        ids = torch.zeros(len(group), max(part.end - part.begin for part in group), dtype=torch.long)
        for row, part in zip(ids, group, strict=True):
            row[: part.end - part.begin] = stream[part.begin : part.end]
        logits = model(ids.to(model.device), use_cache=False).logits
        for row, part in zip(logits, group, strict=True):
            predicted = row[part.first - part.begin : part.end - part.begin].float()
            due = stream[part.first + 1 : part.end + 1].to(predicted.device)
            yield cross_entropy(predicted, due, reduction="none").double().cpu()


def by_position(long: np.ndarray) -> Iterator[tuple[int, int, Estimate]]:
    """Each range of positions and the loss there; nothing without long documents."""
    for begin, end in edges(long.shape[1]) if len(long) else ():
        yield begin, end, ratio(long[:, begin:end].sum(1), np.full(len(long), end - begin))


def edges(length: int) -> Iterator[tuple[int, int]]:
    """Ranges of positions, each four times as far as the one before: 0-64, 64-256, ..., up to `length`."""
    begin, end = 0, FIRST_EDGE
    while begin < length:
        yield begin, min(end, length)
        begin, end = end, end * EDGE_GROWTH
