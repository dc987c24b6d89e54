"""MQAR and the passkey: rows are what their definitions say, and pure functions of their seeds."""

from typing import Any

import numpy as np
import pytest
import torch

from mka.data import load_tokenizer
from mka.data.needle import DIGITS, PasskeyTask
from mka.data.recall import NOT_ASKED, recall_batch
from mka.errors import InputError

SHAPES = [(64, 4), (128, 8), (256, 16), (16, 4)]


@pytest.mark.parametrize(("tokens", "pairs"), SHAPES)
def test_every_key_is_told_and_asked_once(tokens: int, pairs: int) -> None:
    batch = recall_batch(tokens, pairs, 50, (0, 1))
    assert batch.tokens.shape == batch.targets.shape == (50, tokens)
    for row, due in zip(batch.tokens.tolist(), batch.targets.tolist(), strict=True):
        told = dict(zip(row[0 : 2 * pairs : 2], row[1 : 2 * pairs : 2], strict=True))
        assert len(told) == len(set(told.values())) == pairs
        assert all(0 < key < 4096 for key in told)
        assert all(4096 <= value < 8192 for value in told.values())
        asked = [t for t in range(tokens) if due[t] != NOT_ASKED]
        assert all(t >= 2 * pairs for t in asked)
        assert sorted(row[t] for t in asked) == sorted(told)
        assert all(due[t] == told[row[t]] for t in asked)
        assert all(row[t] == 0 for t in range(2 * pairs, tokens) if t not in asked)


def test_questions_come_early_more_often_than_late() -> None:
    """x^(0.01 - 1) over 28 places: drawn first, the first place has the share that the law gives
    it."""
    weights = np.arange(1, 29) ** (0.01 - 1)
    first = (recall_batch(58, 1, 4000, (3,)).targets[:, 2] != NOT_ASKED).float().mean().item()
    assert abs(first - weights[0] / weights.sum()) < 4 * (0.25 * 0.75 / 4000) ** 0.5


def test_the_same_seed_gives_the_same_rows() -> None:
    one, same, other = (recall_batch(64, 4, 8, seed) for seed in ((0, 1), (0, 1), (0, 2)))
    assert torch.equal(one.tokens, same.tokens)
    assert not torch.equal(one.tokens, other.tokens)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InputError, match="num_tokens is 15; it must be at least 16"):
        recall_batch(15, 4, 1, (0,))
    with pytest.raises(InputError, match="vocab_size is 8; 4 pairs need more than 8"):
        recall_batch(64, 4, 1, (0,), vocab_size=8)
    with pytest.raises(InputError, match="num_pairs is 0"):
        recall_batch(64, 0, 1, (0,))


TEXT = "".join(f"line {number} of a text in which nothing is said\n" for number in range(400))


@pytest.fixture(scope="module")
def task() -> tuple[PasskeyTask, object]:
    tokenizer = load_tokenizer("bpe", [TEXT], 300)
    ids = np.array(tokenizer.encode_batch([TEXT])[0])
    return PasskeyTask(ids, lambda text: tokenizer.encode_batch([text])[0]), tokenizer


@pytest.mark.parametrize("length", [150, 1000, 20000])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_key_stands_at_its_depth_and_is_the_answer(
    task: Any, length: int, depth: float
) -> None:
    passkeys, tokenizer = task
    passkey = passkeys.prompt(length, depth, (0, length))
    assert len(passkey.prompt) == length
    text, key = (
        tokenizer.decode(passkey.prompt.tolist()),
        tokenizer.decode(passkey.answer.tolist()).strip(),
    )
    assert len(passkey.answer) == DIGITS == len(set(key))
    assert key.isdecimal()
    told = f"The pass key is {key}. Remember it."
    assert text.count(told) == 1
    assert text.endswith("What is the pass key? The pass key is ")
    before, after = len(text.split(told)[0]), len(text.split(told)[1])
    assert abs(before / (before + after) - depth) < 0.02 + 120 / (before + after)


def test_batches_are_prompts_with_their_answers(task: Any) -> None:
    passkeys, tokenizer = task
    batch = passkeys.batch(200, 6, (0, 3))
    assert batch.tokens.shape == (6, 200)
    for row, due in zip(batch.tokens, batch.targets, strict=True):
        answer = due[due != NOT_ASKED]
        assert (due[: 200 - len(answer)] == NOT_ASKED).all()
        assert torch.equal(row[200 - len(answer) + 1 :], answer[:-1])
        key = tokenizer.decode(answer.tolist()).strip()
        assert f"The pass key is {key}. Remember it." in tokenizer.decode(row.tolist())


def test_passkeys_that_do_not_fit(task: Any) -> None:
    passkeys, _ = task
    with pytest.raises(InputError, match="length is 9; key and question alone take"):
        passkeys.prompt(9, 0.5, (0,))
    with pytest.raises(InputError, match=r"depth is 1\.5; it must be between 0 and 1"):
        passkeys.prompt(999, 1.5, (0,))
