"""Retrieval against brute force, its candidates, its ties, and its indifference to tiles and to the future."""

from typing import Any

import pytest
import torch
from torch import Tensor

import checks_memory
from mka.memory import longterm
from mka.memory.longterm import num_candidates, retrieve

CASES = [
    # tokens, chunk size, window, top-k: windows of none, below, at and above a chunk; K above the number of chunks
    (23, 3, 0, 2),
    (23, 3, 1, 2),
    (23, 3, 5, 1),
    (23, 4, 4, 3),
    (23, 4, 20, 3),
    (23, 1, 2, 40),
    (23, 23, 0, 4),
    (23, 24, 0, 4),
    (65, 7, 13, 50),
    (5, 3, 5, 2),
    (1, 1, 0, 1),
]
limits = pytest.mark.parametrize(("tokens", "chunk_size", "window", "top_k"), CASES)


def inputs(tokens: int, chunk_size: int, groups: int = 2) -> tuple[Tensor, Tensor]:
    """Small integers: float sums of any order are exact, and ties are frequent."""
    generator = torch.Generator().manual_seed(tokens + chunk_size)
    queries = torch.randint(-2, 3, (2, tokens, groups, 4), generator=generator).float()
    return queries, torch.randint(-2, 3, (2, tokens // chunk_size, groups, 4), generator=generator).float()


@limits
def test_equals_brute_force(tokens: int, chunk_size: int, window: int, top_k: int) -> None:
    queries, summaries = inputs(tokens, chunk_size)
    options: dict[str, Any] = {"chunk_size": chunk_size, "window": window, "top_k": top_k}
    fast, slow = retrieve(queries, summaries, **options), checks_memory.brute_force(queries, summaries, **options)
    assert torch.equal(fast.found, slow.found)
    assert torch.equal(fast.chunk, slow.chunk)


@limits
def test_only_completed_chunks_outside_the_window(tokens: int, chunk_size: int, window: int, top_k: int) -> None:
    queries, summaries = inputs(tokens, chunk_size)
    retrieved = retrieve(queries, summaries, chunk_size=chunk_size, window=window, top_k=top_k)
    checks_memory.assert_only_completed_chunks_outside_the_window(retrieved, chunk_size, window)


@limits
def test_the_number_of_candidates_follows_the_rule(tokens: int, chunk_size: int, window: int, top_k: int) -> None:
    counted = [len(checks_memory.rule(t, chunk_size, window)) for t in range(tokens)]
    assert num_candidates(torch.arange(tokens), chunk_size, window).tolist() == counted


def test_the_earlier_chunk_wins_a_tie() -> None:
    checks_memory.assert_earlier_chunk_wins_ties(retrieve)


@pytest.mark.parametrize("name", ["QUERY_TILE", "SUMMARY_TILE"])
@pytest.mark.parametrize("tile", [1, 2, 3, 7, 22, 23, 64])
@pytest.mark.parametrize(("chunk_size", "window"), [(3, 5), (4, 0), (1, 0)])
def test_tiles_do_not_matter(
    name: str, tile: int, chunk_size: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, summaries = inputs(23, chunk_size)
    options: dict[str, Any] = {"chunk_size": chunk_size, "window": window, "top_k": 3}
    whole = retrieve(queries, summaries, **options)
    monkeypatch.setattr(longterm, name, tile)
    tiled = retrieve(queries, summaries, **options)
    assert torch.equal(tiled.chunk, whole.chunk)
    assert torch.equal(tiled.found, whole.found)


def test_more_than_one_tile() -> None:
    tokens = 2 * longterm.QUERY_TILE + 37
    queries, summaries = inputs(tokens, 60, groups=1)
    options: dict[str, Any] = {"chunk_size": 60, "window": 70, "top_k": 3}
    fast = retrieve(queries[:1], summaries[:1], **options)
    slow = checks_memory.brute_force(queries[:1], summaries[:1], **options)
    assert torch.equal(fast.chunk, slow.chunk)
    assert torch.equal(fast.found, slow.found)


@pytest.mark.parametrize("window", [0, 4])
def test_the_future_never_changes_an_earlier_selection(window: int) -> None:
    queries, summaries = inputs(30, 3)
    options: dict[str, Any] = {"chunk_size": 3, "window": window, "top_k": 2}
    before = retrieve(queries, summaries, **options)
    for t in range(30):
        changed, other = queries.clone(), summaries.clone()
        changed[:, t + 1 :] = 1e30
        # The chunk that t stands in is complete only if t is its last token.
        other[:, (t + 1) // 3 :] = 1e30
        after = retrieve(changed, other, **options)
        assert torch.equal(after.chunk[:, : t + 1], before.chunk[:, : t + 1])
        assert torch.equal(after.found[:, : t + 1], before.found[:, : t + 1])


def test_each_group_chooses_for_itself() -> None:
    queries, summaries = inputs(23, 3)
    options: dict[str, Any] = {"chunk_size": 3, "window": 2, "top_k": 2}
    both = retrieve(queries, summaries, **options)
    for group in range(2):
        alone = retrieve(queries[:, :, group, None], summaries[:, :, group, None], **options)
        assert torch.equal(alone.chunk, both.chunk[:, :, group, None])


@pytest.mark.parametrize("top_k", [0, 2])
def test_a_row_without_chunks_finds_nothing(top_k: int) -> None:
    retrieved = retrieve(torch.ones(1, 5, 1, 2), torch.ones(1, 0, 1, 2), chunk_size=6, window=0, top_k=top_k)
    assert retrieved.chunk.shape == (1, 5, 1, top_k)
    assert not retrieved.found.any()


def test_scores_are_float32_under_bfloat16_autocast() -> None:
    # In bfloat16 1 + 2^-10 is 1, and the tie would go to the earlier chunk.
    summaries = torch.tensor([1.0, 1 + 2**-10]).view(1, 2, 1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        retrieved = retrieve(torch.ones(1, 4, 1, 1), summaries, chunk_size=2, window=0, top_k=1)
    assert retrieved.chunk[0, -1, 0, 0] == 1


@pytest.mark.parametrize("chunks", [64, 129, 160, 1000])
@pytest.mark.parametrize("top_k", [1, 4, 7])
@pytest.mark.parametrize("candidates", [0, 1, 3, 33, 64, 100])
def test_no_chunk_is_taken_twice(chunks: int, top_k: int, candidates: int) -> None:
    """Few candidates among many: those of one run, or of fewer runs than chunks are wanted."""
    generator = torch.Generator().manual_seed(candidates)
    scores = torch.randn(5, 3, chunks, generator=generator)
    scores[..., candidates:] = -torch.inf
    best, place = longterm.top_by_place(scores.clone(), top_k)
    by_hand = torch.sort(scores, dim=-1, descending=True, stable=True)
    there = min(top_k, candidates, chunks)
    assert torch.equal(best, by_hand.values[..., :top_k])
    assert torch.equal(place[..., :there], by_hand.indices[..., :there])


@pytest.mark.parametrize("chunks", [1, 31, 32, 33, 64, 129, 160, 1000])
@pytest.mark.parametrize("top_k", [1, 4, 7])
@pytest.mark.parametrize("kinds", [6, 300])
def test_best_of_runs_of_neighbours(chunks: int, top_k: int, kinds: int) -> None:
    """Six different scores: nearly all are ties. 300: the best stand anywhere, some after the last run."""
    generator = torch.Generator().manual_seed(chunks)
    scores = torch.randint(0, kinds, (30, 7, chunks), generator=generator).float()
    scores[scores == 0] = -torch.inf
    by_hand = torch.sort(scores, dim=-1, descending=True, stable=True)
    best, place = longterm.top_by_place(scores.clone(), top_k)
    assert torch.equal(best, by_hand.values[..., :top_k])
    found = best > -torch.inf
    assert torch.equal(place[found], by_hand.indices[..., :top_k][found])
