"""Multi-query associative recall (MQAR): pairs of key and value are told once, then each key asks
for its value.

    k1 v1 k2 v2 k3 v3 k4 v4 . . k3 . . . . k1 . k4 . . . . . k2 .
    told                    asked: each key once, at power-law gaps; its value is due at the key

As defined by zoology (arXiv 2312.04927): keys come from the lower half of the vocabulary and values
from the upper half, the distance of a question follows x^(a - 1), and all other tokens are 0.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mka.errors import InputError, check_at_least

NOT_ASKED = -100
"""The target of a token after which nothing is due; cross_entropy ignores it."""
POWER = 0.01
"""a, of the power law of gaps."""


class RecallBatch(NamedTuple):
    """Rows of a task."""

    tokens: Tensor
    """(B, T) int64: what is read"""
    targets: Tensor
    """(B, T) int64: what is due after each token; NOT_ASKED: nothing"""


def recall_batch(
    num_tokens: int, num_pairs: int, batch_size: int, seed: tuple[int, ...], vocab_size: int = 8192
) -> RecallBatch:
    """Rows of the task; the same arguments give the same ones.

    Args:
        num_tokens: T, tokens per row; at least 4 per pair.
        num_pairs: pairs per row.
        batch_size: B, the number of rows.
        seed: random seed.
        vocab_size: V, token ids. Default: 8192.

    Raises ValueError if the pairs and their questions do not fit, and if the vocabulary
    is too small.
    """
    check_at_least("num_pairs", num_pairs, 1)
    check_at_least("num_tokens", num_tokens, 4 * num_pairs)
    if vocab_size // 2 <= num_pairs:
        raise InputError(
            f"vocab_size is {vocab_size}; {num_pairs} pairs need more than {2 * num_pairs}"
        )
    rng = np.random.default_rng(seed)
    half = vocab_size // 2
    rows = np.arange(batch_size)[:, None]
    # Token 0 is left out: it fills the gaps.
    keys = distinct(rng, batch_size, half - 1, num_pairs) + 1
    values = distinct(rng, batch_size, vocab_size - half, num_pairs) + half
    told = 2 * num_pairs
    places = (num_tokens - told) // 2
    gap = np.arange(1, places + 1, dtype=np.float64) ** (POWER - 1)
    noise = rng.gumbel(size=(batch_size, places)) + np.log(gap)
    # The largest of log-weights plus Gumbel noise are a sample without replacement by
    # the weights.
    asked = told + 2 * np.argsort(-noise, axis=1)[:, :num_pairs]
    tokens = np.zeros((batch_size, num_tokens), dtype=np.int64)
    targets = np.full_like(tokens, NOT_ASKED)
    tokens[:, 0:told:2], tokens[:, 1:told:2] = keys, values
    tokens[rows, asked], targets[rows, asked] = keys, values
    return RecallBatch(torch.from_numpy(tokens), torch.from_numpy(targets))


def distinct(rng: np.random.Generator, rows: int, choices: int, count: int) -> np.ndarray:
    """Random numbers below `choices`, (rows, count), different within each row."""
    return np.stack([rng.choice(choices, count, replace=False) for _ in range(rows)])
