"""How well a model predicts whole documents: perplexities and bits per byte.

    document  [end of text] t_0 t_1 ... t_n-1   each t_i is predicted once
    windows   |-- max_length --|                the first predicts all of its tokens,
                   |-- max_length --|           each later one its last `stride` tokens

With `stride` = `max_length` these are lm-eval's rolling windows, and the sums are those
of its word_perplexity, byte_perplexity and bits_per_byte. Words are separated by white
space; bytes are those of UTF-8.
"""

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mka.errors import InputError, check_whole
from mka.models import evaluating
from mka.record.intervals import Estimate, Verdict, ratio, verdict

FIRST_EDGE, EDGE_GROWTH = 64, 4
DEFAULT_LENGTH = 1024
"""Tokens per window if the model's configuration gives no limit."""


@dataclass(frozen=True)
class Perplexity:
    """Scores of N documents: sums per document, which give every value and its 95 % interval.

    Attributes:
        nats: the negative log-likelihood of each document, (N,).
        tokens: the predicted tokens of each document, (N,).
        long: nats of each token in the first window of the documents that fill one,
            (L, max_length).
        max_length: tokens per window.
        stride: tokens that each window after the first predicts.
        words, num_bytes: words and bytes of each document's text, (N,); None if only token ids were
            given.
    """

    nats: np.ndarray
    tokens: np.ndarray
    long: np.ndarray
    max_length: int
    stride: int
    words: np.ndarray | None = None
    num_bytes: np.ndarray | None = None

    @property
    def loss(self) -> Estimate:
        """The mean loss, in nats per token."""
        return ratio(self.nats, self.tokens)

    @property
    def token_perplexity(self) -> Estimate:
        """exp(loss), per token of this tokenizer."""
        return Estimate(*map(exp, self.loss))

    @property
    def word_perplexity(self) -> Estimate:
        """Perplexity per word. Raises InputError if the text is not known."""
        return Estimate(*map(exp, ratio(self.nats, self.of_text(self.words))))

    @property
    def bits_per_byte(self) -> Estimate:
        """Bits per byte of UTF-8, which can be compared between tokenizers.

        Raises InputError if the text is not known.
        """
        return ratio(self.nats / math.log(2), self.of_text(self.num_bytes))

    def by_position(self) -> Iterator[tuple[int, int, Estimate]]:
        """Ranges of positions [begin, end) and the mean nats per token there.

        Only documents that fill a window count; without one there are no ranges.
        """
        for begin, end in edges(self.max_length) if len(self.long) else ():
            size = np.full(len(self.long), end - begin)
            yield begin, end, ratio(self.long[:, begin:end].sum(1), size)

    def minus(self, other: "Perplexity") -> tuple[Estimate, Verdict]:
        """This model's bits per byte minus another model's on the same documents, and
        the verdict.

        Raises InputError if the text is not known, and if the documents are not the
        same.
        """
        ours, theirs = self.of_text(self.num_bytes), other.of_text(other.num_bytes)
        if not np.array_equal(ours, theirs):
            raise InputError("the two were scored on different documents; give both the same")
        # Paired by document, so that what is hard for both models cancels.
        estimate = ratio((self.nats - other.nats) / math.log(2), ours)
        return estimate, verdict(estimate)

    def of_text(self, counts: np.ndarray | None) -> np.ndarray:
        """The counts, unchanged. Raises InputError if they are None."""
        if counts is None:
            raise InputError(
                "words and bytes are not known of token ids; score the text: text_perplexity"
            )
        return counts


class Window(NamedTuple):
    """One window over a document: it reads the inputs [begin, end) and predicts [first,
    end).

    Inputs are the document's tokens with the end of text before them.
    """

    begin: int
    first: int
    end: int


def exp(x: float) -> float:
    """exp(x); infinity if it is too large for a float. NaN, a missing interval, stays
    NaN."""
    # math.exp raises an error above about 709.
    return math.inf if x > 709 else math.exp(x)


def windows(num_tokens: int, max_length: int, stride: int) -> Iterator[Window]:
    """The windows over a document of `num_tokens` tokens; together they predict each
    token once."""
    first, end = 0, min(max_length, num_tokens)
    while first < num_tokens:
        yield Window(max(0, end - max_length), first, end)
        first, end = end, min(num_tokens, end + stride)


def edges(length: int) -> Iterator[tuple[int, int]]:
    """Ranges of positions up to `length`, each ending four times as far out: 0-64,
    64-256, ..."""
    begin, end = 0, FIRST_EDGE
    while begin < length:
        yield begin, min(end, length)
        begin, end = end, end * EDGE_GROWTH


def window_length(model: Any, max_length: int | None = None, stride: int | None = None) -> int:
    """Tokens per window: `max_length`, or by default as many as the model was made for.

    Raises InputError for more tokens than the model has learned positions for, and for
    a stride longer than the window.
    """
    takes = getattr(model.config, "max_position_embeddings", None) or DEFAULT_LENGTH
    length = max_length or takes
    # Rotary positions have no hard limit, so a longer window may be asked for.
    if length > takes and not getattr(model.config, "rope_parameters", None):
        raise InputError(f"max_length is {length}; this model has positions for {takes} tokens")
    if stride is not None and stride > length:
        raise InputError(f"stride is {stride}; a window has {length} tokens")
    return length


@torch.no_grad()
def perplexity(
    model: Any,
    tokens: Tensor | np.ndarray | Sequence[Any],
    *,
    begin: int | None = None,
    max_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
) -> Perplexity:
    """Score token ids with a causal language model of transformers, ours or any other.

    Args:
        model: the model; it is scored in evaluation mode and then returned to its own
            mode.
        tokens: the ids of one document (T,), or of several: (N, T), or a list of lists
            of ids.
        begin: a token to put before each document so that its first token is predicted
            too, as a rule the tokenizer's BOS or end of text. None: the first token is
            only read.
        max_length: tokens per window; None: as many as the model was made for.
        stride: tokens that each window after the first predicts; None: all of them
            (disjoint windows).
        batch_size: windows to read at once.

    Raises InputError for a document without a token to predict, and for windows that
    are too long for the model.
    """
    for name, value in (("max_length", max_length), ("stride", stride), ("batch_size", batch_size)):
        check_whole(name, value, 1)
    length = window_length(model, max_length, stride)
    vocab_size = model.get_input_embeddings().num_embeddings
    nats, counts, long = [], [], []
    for number, ids in enumerate(documents_of(tokens)):
        stream = ids if begin is None else torch.cat([torch.tensor([begin]), ids])
        if len(stream) < 2:
            raise InputError(
                f"document {number} has {len(ids)} tokens; there is nothing to predict"
            )
        if not 0 <= int(stream.min()) <= int(stream.max()) < vocab_size:
            raise InputError(
                f"document {number} has ids from {int(stream.min())} to {int(stream.max())}; the "
                f"model has {vocab_size}, from 0"
            )
        parts = [*windows(len(stream) - 1, length, stride or length)]
        with evaluating(model):
            losses = torch.cat([*token_losses(model, stream, parts, batch_size)])
        nats.append(losses.sum().item())
        counts.append(len(losses))
        # Only the first window sees the document from its beginning, so position means
        # the same.
        if len(losses) >= length:
            long.append(losses[:length].numpy())
    if not nats:
        raise InputError("tokens is empty; give at least one document")
    # Reshaped, because an empty list would become an array without columns.
    first_windows = np.array(long).reshape(len(long), length)
    return Perplexity(np.array(nats), np.array(counts), first_windows, length, stride or length)


def documents_of(tokens: Any) -> list[Tensor]:
    """The ids of each document, one tensor (T,) per document, on the CPU.

    Raises InputError for what is not token ids.
    """
    try:
        if isinstance(tokens, Tensor | np.ndarray):
            many = torch.as_tensor(tokens)
            found = [*many] if many.dim() == 2 else [many]
        else:
            found = [torch.as_tensor(ids) for ids in tokens]
            # One list of ids is one document.
            found = [torch.stack(found)] if found and found[0].dim() == 0 else found
    except (TypeError, ValueError, RuntimeError):
        found = []
        if not hasattr(tokens, "__len__") or len(tokens):
            raise InputError(f"tokens is {str(tokens)[:40]!r}; give lists of token ids") from None
    for ids in found:
        if ids.dim() != 1 or (ids.is_floating_point() and len(ids)) or ids.dtype == torch.bool:
            raise InputError(
                f"a document is {ids.dtype} of shape {tuple(ids.shape)}; give token ids, (T,)"
            )
    return [ids.cpu().long() for ids in found]


def text_perplexity(
    model: Any,
    tokenizer: Any,
    documents: Sequence[str],
    *,
    max_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 4,
    max_tokens: int | None = None,
) -> Perplexity:
    """Score texts as `perplexity` does, each after the tokenizer's BOS or end of text.

    Words and bytes are counted too. Documents are taken in order, whole, until at least
    `max_tokens` tokens are scored (None: all documents). Raises InputError for a
    tokenizer without BOS and end of text, for documents without a token, and as
    `perplexity` does.
    """
    if isinstance(documents, str):
        raise InputError("documents is one text; give a list of texts")
    check_whole("max_tokens", max_tokens, 1)
    begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if begin is None:
        raise InputError("the tokenizer has no token that begins a text")
    # Called for its errors, before a long corpus is tokenized.
    window_length(model, max_length, stride)
    taken: list[list[int]] = []
    sizes: list[tuple[int, int]] = []
    total = 0
    for text in documents:
        # Not verbose: it would warn of every document that is longer than the model's
        # limit.
        ids = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        if not ids:
            continue
        taken.append(ids)
        sizes.append((len(re.split(r"\s+", text)), len(text.encode())))
        total += len(ids)
        if max_tokens is not None and total >= max_tokens:
            break
    if not taken:
        raise InputError("the documents hold no token")
    options = {"max_length": max_length, "stride": stride, "batch_size": batch_size}
    words, num_bytes = np.array(sizes).T
    return replace(
        perplexity(model, taken, begin=begin, **options), words=words, num_bytes=num_bytes
    )


def token_losses(
    model: Any, stream: Tensor, parts: Sequence[Window], batch_size: int
) -> Iterator[Tensor]:
    """The nats of the tokens that each window predicts, float64 (end - first,)."""
    for start in range(0, len(parts), batch_size):
        group = parts[start : start + batch_size]
        # Padded on the right, which no token sees in a causal model.
        ids = torch.zeros(
            len(group), max(part.end - part.begin for part in group), dtype=torch.long
        )
        for row, part in zip(ids, group, strict=True):
            row[: part.end - part.begin] = stream[part.begin : part.end]
        logits = model(ids.to(model.device), use_cache=False).logits
        for row, part in zip(logits, group, strict=True):
            predicted = row[part.first - part.begin : part.end - part.begin].float()
            due = stream[part.first + 1 : part.end + 1].to(predicted.device)
            yield cross_entropy(predicted, due, reduction="none").double().cpu()
