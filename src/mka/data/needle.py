"""The passkey task: a number said once, somewhere in a long text, and asked for at the end (arXiv 2305.16300).

    text text | The pass key is 5 8 2 1 3. ... | text text text | What is the pass key? The pass key is | 5 8 2 1 3
                depth 0 .. 1                                      question                                answer

The digits differ and are encoded one by one, so that a model that finds them can copy them by what stood before each:
finding is what is measured. The text around begins at a place that the seed draws, and again where it is too short: a
few sentences said over and over, as in the paper (nothing in them looks like the key), or a corpus's own (much does).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mka.data.recall import NOT_ASKED, RecallBatch
from mka.limits import InputError

DIGITS = 5
TOLD, QUESTION = (
    ("\nThe pass key is ", ". Remember it. ", " is the pass key.\n"),
    "\nWhat is the pass key? The pass key is ",
)

FILLER = (
    "The road is long. The hill is steep and the wind is cold. We walk on, and the day goes by. Then we come back. "
)
"""Said over and over."""


@dataclass(frozen=True)
class Passkey:
    """A prompt's tokens, and those of its answer."""

    prompt: np.ndarray
    answer: np.ndarray


@dataclass(frozen=True)
class PasskeyTask:
    """Prompts over one text: `ids` (N,) its tokens, `encode` from text to tokens without special ones."""

    ids: np.ndarray
    encode: Callable[[str], Sequence[int]]

    def prompt(self, length: int, depth: float, seed: tuple[int, ...]) -> Passkey:
        """`length` tokens, the question included, with the key `depth` (0: first, 1: last) of the way in.

        A pure function of its arguments. Raises InputError for a length that does not hold key and question.
        """
        rng = np.random.default_rng(seed)
        answer = self.tokens(*(str(digit) for digit in rng.permutation(10)[:DIGITS]))
        before, between, after = map(self.tokens, TOLD)
        told, question = np.concatenate([before, answer, between, answer, after]), self.tokens(QUESTION)
        around = length - len(told) - len(question)
        if around < 0:
            raise InputError(f"length is {length}; key and question alone take {length - around} tokens")
        if not 0 <= depth <= 1:
            raise InputError(f"depth is {depth}; it must be between 0 and 1")
        start = int(rng.integers(len(self.ids)))
        text = self.ids[np.arange(start, start + around) % len(self.ids)].astype(np.int64)
        place = round(depth * around)
        return Passkey(np.concatenate([text[:place], told, text[place:], question]), answer)

    def tokens(self, *texts: str) -> np.ndarray:
        """Each encoded by itself, one after the other."""
        return np.concatenate([np.asarray(self.encode(text), dtype=np.int64) for text in texts])

    def batch(self, length: int, rows: int, seed: tuple[int, ...]) -> RecallBatch:
        """Rows of `length` tokens, prompt and answer, at depths drawn evenly: for training."""
        tokens = np.empty((rows, length), dtype=np.int64)
        targets = np.full((rows, length), NOT_ASKED, dtype=np.int64)
        for row in range(rows):
            depth = float(np.random.default_rng([*seed, row, 1]).random())
            widest = self.prompt(length - 1, depth, (*seed, row))
            answer = widest.answer
            passkey = self.prompt(length - len(answer) + 1, depth, (*seed, row))
            tokens[row] = np.concatenate([passkey.prompt, answer[:-1]])
            targets[row, length - len(answer) :] = answer
        return RecallBatch(torch.from_numpy(tokens), torch.from_numpy(targets))
