"""The passkey task: a number stated once in a long text, and asked for at its end (arXiv
2305.16300).

    text | The pass key is 5 8 2 1 3. ... | text | What is the pass key? The pass key is | 5 8 2 1 3
           depth 0 .. 1                            question                                answer

The digits are different and are encoded one by one, so that a model that has found them can copy
each by what precedes it: what is measured is finding. The text around begins at a random place, and
is repeated if it is too short. It consists of a few sentences over and over, as in the paper, in
which nothing looks like the key, or it is that of a corpus, in which much does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mka.data.recall import NOT_ASKED, RecallBatch
from mka.errors import InputError

DIGITS = 5
"""Digits of a key, all different."""
TOLD, QUESTION = (
    ("\nThe pass key is ", ". Remember it. ", " is the pass key.\n"),
    "\nWhat is the pass key? The pass key is ",
)

FILLER = (
    "The road is long. The hill is steep and the wind is cold. We walk on, and the day "
    "goes by. Then we come back. "
)
"""The sentences that are repeated."""


@dataclass(frozen=True)
class Passkey:
    """A prompt and its answer.

    Args:
        prompt: (T,) token ids, the question included.
        answer: (N,) token ids.
    """

    prompt: np.ndarray
    answer: np.ndarray


@dataclass(frozen=True)
class PasskeyTask:
    """Prompts made of one text.

    Args:
        ids: (N,) token ids of the text.
        encode: from a text to its token ids, without special ones.
    """

    ids: np.ndarray
    encode: Callable[[str], Sequence[int]]

    def prompt(self, length: int, depth: float, seed: tuple[int, ...]) -> Passkey:
        """A prompt; the same arguments give the same one.

        Args:
            length: tokens of the prompt, the question included.
            depth: how far into the text the key is, from 0 (at its beginning) to 1 (at
                its end).
            seed: random seed for the key and for where the text begins.

        Raises InputError if key and question do not fit, and for a depth outside 0 to
        1.
        """
        rng = np.random.default_rng(seed)
        answer = self.tokens(*(str(digit) for digit in rng.permutation(10)[:DIGITS]))
        before, between, after = map(self.tokens, TOLD)
        told = np.concatenate([before, answer, between, answer, after])
        question = self.tokens(QUESTION)
        around = length - len(told) - len(question)
        if around < 0:
            raise InputError(
                f"length is {length}; key and question alone take {length - around} tokens"
            )
        if not 0 <= depth <= 1:
            raise InputError(f"depth is {depth}; it must be between 0 and 1")
        start = int(rng.integers(len(self.ids)))
        text = self.ids[np.arange(start, start + around) % len(self.ids)].astype(np.int64)
        place = round(depth * around)
        return Passkey(np.concatenate([text[:place], told, text[place:], question]), answer)

    def tokens(self, *texts: str) -> np.ndarray:
        """Token ids (N,) of the texts, each encoded by itself, so that none merge."""
        return np.concatenate([np.asarray(self.encode(text), dtype=np.int64) for text in texts])

    def batch(self, length: int, rows: int, seed: tuple[int, ...]) -> RecallBatch:
        """Rows for training: `rows` prompts with their answers, `length` tokens each.

        seed: random seed for the keys, the text, and the depths, which are uniform in 0
            to 1.

        Raises InputError if key and question do not fit.
        """
        tokens = np.empty((rows, length), dtype=np.int64)
        targets = np.full((rows, length), NOT_ASKED, dtype=np.int64)
        for row in range(rows):
            depth = float(np.random.default_rng([*seed, row, 1]).random())
            # How long a prompt may be depends on the answer's tokens, which a first
            # draw tells: the key does not depend on the length.
            widest = self.prompt(length - 1, depth, (*seed, row))
            answer = widest.answer
            passkey = self.prompt(length - len(answer) + 1, depth, (*seed, row))
            tokens[row] = np.concatenate([passkey.prompt, answer[:-1]])
            targets[row, length - len(answer) :] = answer
        return RecallBatch(torch.from_numpy(tokens), torch.from_numpy(targets))
