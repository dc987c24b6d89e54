"""Retrieval against brute force, its candidates, its ties, and its indifference to tiles and to the
future."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import checks_memory
from mka.memory import search
from mka.memory.search import (
    AsRead,
    Limits,
    Near,
    Retrieved,
    best_by_keys,
    retrieve,
    retrieve_as_read,
    top_by_place,
)

CASES = [
    # tokens, chunk size, window, top-k: windows of none, below, at and above a chunk; K above the
    # number of chunks
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
    return queries, torch.randint(
        -2, 3, (2, tokens // chunk_size, groups, 4), generator=generator
    ).float()


@limits
def test_equals_brute_force(tokens: int, chunk_size: int, window: int, top_k: int) -> None:
    queries, summaries = inputs(tokens, chunk_size)
    rule = Limits(chunk_size, window, top_k)
    fast, slow = (
        retrieve(queries, summaries, rule),
        checks_memory.brute_force(queries, summaries, rule),
    )
    checks_memory.assert_same_choice(fast, slow)


@limits
def test_only_completed_chunks_outside_the_window(
    tokens: int, chunk_size: int, window: int, top_k: int
) -> None:
    queries, summaries = inputs(tokens, chunk_size)
    retrieved = retrieve(queries, summaries, Limits(chunk_size, window, top_k))
    checks_memory.assert_only_completed_chunks_outside_the_window(retrieved, chunk_size, window)


@limits
def test_the_number_of_candidates_follows_the_rule(
    tokens: int, chunk_size: int, window: int, top_k: int
) -> None:
    counted = [len(checks_memory.rule(t, chunk_size, window)) for t in range(tokens)]
    assert Limits(chunk_size, window, top_k).end(torch.arange(tokens)).tolist() == counted
    assert [Limits(chunk_size, window, 1).count(t + 1) for t in range(tokens)] == counted


def test_the_earlier_chunk_wins_a_tie() -> None:
    checks_memory.assert_earlier_chunk_wins_ties(retrieve)


@pytest.mark.parametrize("name", ["QUERY_TILE", "SUMMARY_TILE"])
@pytest.mark.parametrize("tile", [1, 2, 3, 7, 22, 23, 64])
@pytest.mark.parametrize(("chunk_size", "window"), [(3, 5), (4, 0), (1, 0)])
def test_tiles_do_not_matter(
    name: str, tile: int, chunk_size: int, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries, summaries = inputs(23, chunk_size)
    rule = Limits(chunk_size, window, 3)
    whole = retrieve(queries, summaries, rule)
    monkeypatch.setattr(search, name, tile)
    tiled = retrieve(queries, summaries, rule)
    assert torch.equal(tiled.chunk, whole.chunk)
    assert torch.equal(tiled.found, whole.found)


def test_more_than_one_tile() -> None:
    tokens = 2 * search.QUERY_TILE + 37
    queries, summaries = inputs(tokens, 60, groups=1)
    rule = Limits(60, 70, 3)
    fast = retrieve(queries[:1], summaries[:1], rule)
    slow = checks_memory.brute_force(queries[:1], summaries[:1], rule)
    assert torch.equal(fast.chunk, slow.chunk)
    assert torch.equal(fast.found, slow.found)


@pytest.mark.parametrize("window", [0, 4])
def test_the_future_never_changes_an_earlier_selection(window: int) -> None:
    queries, summaries = inputs(30, 3)
    rule = Limits(3, window, 2)
    before = retrieve(queries, summaries, rule)
    for t in range(30):
        changed, other = queries.clone(), summaries.clone()
        changed[:, t + 1 :] = 1e30
        # The chunk that t stands in is complete only if t is its last token.
        other[:, (t + 1) // 3 :] = 1e30
        after = retrieve(changed, other, rule)
        assert torch.equal(after.chunk[:, : t + 1], before.chunk[:, : t + 1])
        assert torch.equal(after.found[:, : t + 1], before.found[:, : t + 1])


def test_each_group_chooses_for_itself() -> None:
    queries, summaries = inputs(23, 3)
    rule = Limits(3, 2, 2)
    both = retrieve(queries, summaries, rule)
    for group in range(2):
        alone = retrieve(queries[:, :, group, None], summaries[:, :, group, None], rule)
        assert torch.equal(alone.chunk, both.chunk[:, :, group, None])


@pytest.mark.parametrize("top_k", [0, 2])
def test_a_row_without_chunks_finds_nothing(top_k: int) -> None:
    retrieved = retrieve(torch.ones(1, 5, 1, 2), torch.ones(1, 0, 1, 2), Limits(6, 0, top_k))
    assert retrieved.chunk.shape == (1, 5, 1, 0), "no more columns than chunks"
    assert not retrieved.found.any()


def test_scores_are_float32_under_bfloat16_autocast() -> None:
    # In bfloat16 1 + 2^-10 is 1, and the tie would go to the earlier chunk.
    summaries = torch.tensor([1.0, 1 + 2**-10]).view(1, 2, 1, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        retrieved = retrieve(torch.ones(1, 4, 1, 1), summaries, Limits(2, 0, 1))
    assert retrieved.chunk[0, -1, 0, 0] == 1


@pytest.mark.parametrize("chunks", [64, 129, 160, 1000])
@pytest.mark.parametrize("top_k", [1, 4, 7])
@pytest.mark.parametrize("candidates", [0, 1, 3, 33, 64, 100])
def test_no_chunk_is_taken_twice(chunks: int, top_k: int, candidates: int) -> None:
    """Few candidates among many."""
    generator = torch.Generator().manual_seed(candidates)
    scores = torch.randn(5, 3, chunks, generator=generator)
    scores[..., candidates:] = -torch.inf
    best, place = top_by_place(scores.clone(), top_k)
    by_hand = torch.sort(scores, dim=-1, descending=True, stable=True)
    there = min(top_k, candidates, chunks)
    assert torch.equal(best, by_hand.values[..., :top_k])
    assert torch.equal(place[..., :there], by_hand.indices[..., :there])


@pytest.mark.parametrize("chunks", [1, 31, 32, 33, 64, 129, 160, 1000])
@pytest.mark.parametrize("top_k", [1, 4, 7])
@pytest.mark.parametrize("kinds", [6, 300])
def test_best_by_place(chunks: int, top_k: int, kinds: int) -> None:
    """Six different scores: nearly all are ties. 300: few are."""
    generator = torch.Generator().manual_seed(chunks)
    scores = torch.randint(0, kinds, (30, 7, chunks), generator=generator).float()
    scores[scores == 0] = -torch.inf
    by_hand = torch.sort(scores, dim=-1, descending=True, stable=True)
    best, place = top_by_place(scores.clone(), top_k)
    assert torch.equal(best, by_hand.values[..., :top_k])
    found = best > -torch.inf
    assert torch.equal(place[found], by_hand.indices[..., :top_k][found])


# tokens, heads, groups, chunk size, window, top-k, sinks, banked
READS = [
    (23, 4, 2, 3, 5, 2, 0, 0),
    (23, 4, 4, 3, 5, 2, 4, 0),
    (23, 2, 1, 1, 4, 3, 3, 0),
    (40, 6, 3, 4, 6, 50, 4, 0),
    (30, 4, 2, 3, 4, 3, 1, 5),
    (9, 2, 2, 4, 4, 2, 3, 0),
]
every_read = pytest.mark.parametrize(
    ("tokens", "heads", "groups", "chunk_size", "window", "top_k", "sinks", "banked"), READS
)


def as_read(tokens: int, heads: int, groups: int, chunks: int, seed: int) -> AsRead:
    generator = torch.Generator().manual_seed(seed)
    shapes = (2, tokens, heads, 4), (2, chunks, groups, 4)
    return AsRead(
        *(torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    )


def any_order(tokens: int, chunks: int) -> Near:
    generator = torch.Generator().manual_seed(2)
    return Near(*(torch.randint(0, 9, (2, n), generator=generator) for n in (tokens, chunks)))


NEARNESS: dict[str, Callable[[int, int], Near | None]] = {
    "all near": lambda tokens, chunks: None,
    "none near": lambda tokens, chunks: Near(torch.ones(1, tokens), torch.zeros(1, chunks)),
    "rising": lambda tokens, chunks: Near(
        torch.arange(tokens)[None] - 11, torch.arange(chunks)[None] * 3
    ),
    "one row far": lambda tokens, chunks: Near(
        torch.tensor([[0], [9]]).expand(-1, tokens), torch.ones(2, chunks)
    ),
    "any order": any_order,
}


def same(a: Retrieved, b: Retrieved) -> None:
    assert torch.equal(a.found, b.found)
    assert torch.equal(a.chunk, b.chunk)


@every_read
@pytest.mark.parametrize("far", list(NEARNESS))
@pytest.mark.parametrize("scores", [None, 1, 100])
def test_as_read_equals_brute_force(
    tokens: int,
    heads: int,
    groups: int,
    chunk_size: int,
    window: int,
    top_k: int,
    sinks: int,
    banked: int,
    far: str,
    scores: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chunks, limits = banked + tokens // chunk_size, Limits(chunk_size, window, top_k, sinks, banked)
    near, other = (as_read(tokens, heads, groups, chunks, seed) for seed in (0, 1))
    inputs_ = (near, other if far != "all near" else None, NEARNESS[far](tokens, chunks), limits)
    if scores is not None:
        monkeypatch.setattr(search, "SCORES", scores)
    checks_memory.assert_same_choice(
        retrieve_as_read(*inputs_), checks_memory.brute_force_as_read(*inputs_)
    )


@every_read
@pytest.mark.parametrize("scores", [None, 1])
def test_by_place_is_the_same_choice_in_order(
    tokens: int,
    heads: int,
    groups: int,
    chunk_size: int,
    window: int,
    top_k: int,
    sinks: int,
    banked: int,
    scores: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chunks, limits = banked + tokens // chunk_size, Limits(chunk_size, window, top_k, sinks, banked)
    near = as_read(tokens, heads, groups, chunks, 0)
    if scores is not None:
        monkeypatch.setattr(search, "SCORES", scores)
    best, ordered = (
        retrieve_as_read(near, None, None, limits, by_place=each) for each in (False, True)
    )
    assert torch.equal(best.found.sum(-1), ordered.found.sum(-1))
    for ours, wanted in zip(*(each_choice(x) for x in (ordered, best)), strict=True):
        assert ours == sorted(wanted)


def each_choice(retrieved: Retrieved) -> list[list[int]]:
    """What each query of each group found, as it stands."""
    pairs = zip(
        retrieved.chunk.flatten(0, 2).tolist(), retrieved.found.flatten(0, 2).tolist(), strict=True
    )
    return [[j for j, there in zip(*pair, strict=True) if there] for pair in pairs]


def test_by_keys_each_head_has_the_say_of_what_it_reads_in_chunks() -> None:
    """Two heads: one reads its window alone, the other chunks; of equal ones the earlier is
    taken."""
    proposed = Retrieved(
        torch.tensor([2, 5, 7, 9]).view(1, 1, 1, 4),
        torch.tensor([True, True, True, False]).view(1, 1, 1, 4),
    )
    sums = torch.tensor([[1.0, 4.0], [3.0, 1.0], [1.0, 4.0], [-torch.inf, -torch.inf]]).view(
        1, 1, 1, 4, 2
    )
    window = torch.tensor([50.0, 2.0]).view(1, 1, 2)
    assert best_by_keys(proposed, sums, window, 1).chunk.tolist() == [[[[2]]]]
    assert best_by_keys(proposed, sums, window, 2).chunk.flatten().tolist() == [2, 7]
    assert best_by_keys(proposed, sums, window.flip(-1), 1).chunk.tolist() == [[[[5]]]]
    assert best_by_keys(proposed, sums, window + 400, 1).chunk.tolist() == [[[[2]]]]
    assert best_by_keys(proposed, sums, window.flip(-1) + 400, 1).chunk.tolist() == [
        [[[5]]]
    ]  # in no head any share
    every = best_by_keys(proposed, sums, window, 4)
    assert every.found.flatten().tolist() == [True, True, True, False]
    assert sorted(every.chunk[every.found].tolist()) == [2, 5, 7]
    none = best_by_keys(
        proposed._replace(found=proposed.found & False), sums - torch.inf, window, 2
    )
    assert not none.found.any()


def test_a_head_that_is_sure_outvotes_those_that_are_not() -> None:
    """Two heads of a group: one wants chunk 1 alone, the other hesitates between 2 and 3, on a
    larger scale."""
    keys = torch.eye(4).view(1, 4, 1, 4)
    q = torch.tensor([[0.0, 12.0, 0.0, 0.0], [0.0, 0.0, 20.0, 20.0]]).view(1, 1, 2, 4)
    limits, at = Limits(1, 0, 1), torch.tensor([[3]])
    assert retrieve(q.sum(2, keepdim=True), keys, limits, at).chunk.item() == 2
    assert retrieve_as_read(AsRead(q, keys), None, None, limits, at).chunk.item() == 1


@every_read
def test_as_read_the_future_never_changes_an_earlier_selection(
    tokens: int,
    heads: int,
    groups: int,
    chunk_size: int,
    window: int,
    top_k: int,
    sinks: int,
    banked: int,
) -> None:
    chunks, limits = banked + tokens // chunk_size, Limits(chunk_size, window, top_k, sinks, banked)
    near = as_read(tokens, heads, groups, chunks, 0)
    before = retrieve_as_read(near, None, None, limits)
    for t in range(tokens):
        q, keys = near.queries.clone(), near.keys.clone()
        q[:, t + 1 :] = 1e300
        keys[:, banked + (t + 1) // chunk_size :] = 1e300
        after = retrieve_as_read(AsRead(q, keys), None, None, limits)
        same(*(Retrieved(*(x[:, : t + 1] for x in each)) for each in (after, before)))


@pytest.mark.parametrize("limits", [Limits(3, 4, 2, 4, 5), Limits(2, 3, 1, 4), Limits(5, 6, 2, 3)])
def test_candidates_are_counted_and_hidden(limits: Limits) -> None:
    for t in range(40):
        allowed = checks_memory.candidates_of(t, limits)
        assert limits.count(t + 1) == len(allowed)
        assert limits.reach(t + 1) == limits.end(torch.tensor(t))
        scores = torch.zeros(limits.banked + 40)
        limits.hide(scores, limits.end(torch.tensor(t)))
        assert (scores == 0).nonzero().flatten().tolist() == allowed
    assert Limits(3, 4, 0, 4).count(40) == 0
