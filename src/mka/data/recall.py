"""Multi-query associative recall (MQAR): pairs are told once, then each key is asked for its value.

    k1 v1 k2 v2 k3 v3 k4 v4 . . k3 . . . . k1 . k4 . . . . . k2 .        the answer to a key is due where it stands
    told                    asked, each key once, at power-law gaps

As zoology defines it (arXiv 2312.04927): keys come from the lower half of the vocabulary, values from the upper half, a
question's distance follows x^(a - 1), and what lies between is token 0.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mka.limits import InputError, check_at_least

NOT_ASKED = -100
"""The target of a token after which nothing is asked; what cross_entropy ignores."""
POWER = 0.01
"""a of the gaps' power law."""


class RecallBatch(NamedTuple):
    """Both (B, T) int64: what is read, and what is due after each token (NOT_ASKED: nothing)."""

    tokens: Tensor
    targets: Tensor


def recall_batch(
    num_tokens: int, num_pairs: int, batch_size: int, seed: tuple[int, ...], vocab_size: int = 8192
) -> RecallBatch:
    """`batch_size` rows of `num_tokens` tokens with `num_pairs` pairs: a pure function of its arguments.

    Raises ValueError where the pairs and their questions do not fit (4 tokens a pair), or the vocabulary is too small.
    """
    check_at_least("num_pairs", num_pairs, 1)
    check_at_least("num_tokens", num_tokens, 4 * num_pairs)
    if vocab_size // 2 <= num_pairs:
        raise InputError(f"vocab_size is {vocab_size}; {num_pairs} pairs need more than {2 * num_pairs}")
    rng = np.random.default_rng(seed)
    half = vocab_size // 2
    rows = np.arange(batch_size)[:, None]
    keys = distinct(rng, batch_size, half - 1, num_pairs) + 1
    values = distinct(rng, batch_size, vocab_size - half, num_pairs) + half
    told = 2 * num_pairs
    places = (num_tokens - told) // 2
    gap = np.arange(1, places + 1, dtype=np.float64) ** (POWER - 1)
    noise = rng.gumbel(size=(batch_size, places)) + np.log(gap)
    asked = told + 2 * np.argsort(-noise, axis=1)[:, :num_pairs]  # places drawn without replacement, by that law
    tokens = np.zeros((batch_size, num_tokens), dtype=np.int64)
    targets = np.full_like(tokens, NOT_ASKED)
    tokens[:, 0:told:2], tokens[:, 1:told:2] = keys, values
    tokens[rows, asked], targets[rows, asked] = keys, values
    return RecallBatch(torch.from_numpy(tokens), torch.from_numpy(targets))


def distinct(rng: np.random.Generator, rows: int, choices: int, count: int) -> np.ndarray:
    """(rows, count) different numbers below `choices` in each row."""
    return np.stack([rng.choice(choices, count, replace=False) for _ in range(rows)])
