"""Batches are a pure function of (seed, step), and count every token once."""

import numpy as np
import pytest
import torch

from mka.data import BlockBatches, TokenSplit, evaluation_batches

T = 8


def counting(num_tokens: int) -> np.ndarray:
    """Token i is the number i, so that a block says where it lies."""
    return np.arange(num_tokens, dtype=np.uint16)


def held_out(num_tokens: int) -> TokenSplit:
    token_bytes = np.random.default_rng(0).integers(0, 9, num_tokens).astype(np.uint32)
    return TokenSplit(counting(num_tokens), token_bytes)


def test_shape_and_type() -> None:
    batch = BlockBatches(counting(100), T, 3, seed=0).at(0)
    assert batch.shape == (3, T + 1)
    assert batch.dtype == torch.int64
    assert (batch[:, 1:] - batch[:, :-1] == 1).all()
    assert (batch[:, 0] % T == 0).all()


def test_large_ids_survive() -> None:
    ids = np.full(20, 65_535, dtype=np.uint16)
    assert BlockBatches(ids, T, 1, seed=0).at(0).max() == 65_535


@pytest.mark.parametrize(
    ("num_tokens", "blocks"), [(9, 1), (16, 1), (17, 2), (24, 2), (25, 3), (1000, 124)]
)
def test_number_of_full_blocks(num_tokens: int, blocks: int) -> None:
    assert BlockBatches(counting(num_tokens), T, 2, seed=0).num_blocks == blocks


def test_a_step_is_a_pure_function() -> None:
    batches = BlockBatches(counting(500), T, 4, seed=3)
    in_order = [batches.at(step) for step in range(60)]
    for step in (59, 0, 31, 31, 7, 58, 1):
        assert torch.equal(batches.at(step), in_order[step])
        assert torch.equal(BlockBatches(counting(500), T, 4, seed=3).at(step), in_order[step])


@pytest.mark.parametrize("batch_size", [1, 4, 5, 12, 30])
def test_no_block_repeats_within_an_epoch(batch_size: int) -> None:
    batches = BlockBatches(counting(100), T, batch_size, seed=1)
    stream = torch.cat([batches.at(step)[:, 0] // T for step in range(60)])
    for epoch in range(len(stream) // 12):
        assert sorted(stream[12 * epoch : 12 * (epoch + 1)].tolist()) == list(range(12))


def test_batch_size_does_not_change_the_order() -> None:
    ones, fives = (BlockBatches(counting(300), T, size, seed=2) for size in (1, 5))
    stream = torch.cat([ones.at(step) for step in range(100)])
    assert torch.equal(stream, torch.cat([fives.at(step) for step in range(20)]))


def test_each_token_after_the_first_is_predicted_once() -> None:
    batches = BlockBatches(counting(8 * 12 + 1), T, 4, seed=0)
    predicted = torch.cat(
        [
            batches.at(step)[:, 1:].flatten()
            for step in range(-(-batches.num_blocks // batches.batch_size))
        ]
    )
    assert sorted(predicted.tolist()) == list(range(1, 97))


def test_seeds_and_epochs_have_their_own_order() -> None:
    orders = {
        tuple(BlockBatches(counting(200), T, 24, seed).at(step)[:, 0].tolist())
        for seed in range(4)
        for step in range(4)
    }
    assert len(orders) == 16


@pytest.mark.parametrize("num_tokens", [0, 1, T])
def test_too_short_a_corpus(num_tokens: int, refused) -> None:
    for message in (
        refused(BlockBatches, counting(num_tokens), T, 1, 0),
        refused(evaluation_batches, held_out(num_tokens), T, 1),
    ):
        assert f"{num_tokens} tokens" in message
        assert f"{T + 1}" in message
        assert "--sequence_length" in message


@pytest.mark.parametrize(("sequence_length", "batch_size"), [(0, 1), (1, 0)])
def test_sizes_from_one_up(sequence_length: int, batch_size: int, refused) -> None:
    refused(BlockBatches, counting(50), sequence_length, batch_size, 0)
    refused(evaluation_batches, held_out(50), sequence_length, batch_size)


@pytest.mark.parametrize("batch_size", [1, 5, 12, 50])
def test_evaluation_covers_everything_in_order(batch_size: int) -> None:
    split = held_out(8 * 12 + 1 + 5)
    assert split.token_bytes is not None
    batches = list(evaluation_batches(split, T, batch_size))
    assert [len(tokens) for tokens, _ in batches] == [batch_size] * (12 // batch_size) + [
        12 % batch_size
    ] * bool(12 % batch_size)
    assert torch.cat([tokens[:, 1:].flatten() for tokens, _ in batches]).tolist() == list(
        range(1, 97)
    )
    for tokens, num_bytes in batches:
        assert type(num_bytes) is int
        assert num_bytes == split.token_bytes[tokens[:, 1:].numpy()].sum()
    assert sum(num_bytes for _, num_bytes in batches) == split.token_bytes[1:97].sum()


@pytest.mark.parametrize(
    ("max_tokens", "blocks"), [(1, 1), (8, 1), (47, 5), (48, 6), (800, 100), (10_000, 124)]
)
def test_limited_evaluation_is_spread_evenly(max_tokens: int, blocks: int) -> None:
    split = held_out(1000)
    firsts = (
        torch.cat([tokens[:, 0] for tokens, _ in evaluation_batches(split, T, 4, max_tokens)]) // T
    )
    assert len(firsts) == blocks
    assert len(set(firsts.tolist())) == blocks
    gaps = torch.diff(firsts, append=torch.tensor([124]))
    assert gaps.min() >= 124 // blocks
    assert gaps.max() <= -(-124 // blocks)
    again = (
        torch.cat([tokens[:, 0] for tokens, _ in evaluation_batches(split, T, 4, max_tokens)]) // T
    )
    assert torch.equal(again, firsts)


def test_evaluation_needs_bytes() -> None:
    with pytest.raises(ValueError, match="byte counts"):
        evaluation_batches(TokenSplit(counting(100), None), T, 1)
