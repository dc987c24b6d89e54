"""Retrieval, token by token: what the memory tests compare with, and what the negative tests
plant."""

from collections.abc import Callable

import torch
from torch import Tensor

from mka.memory.search import AsRead, Limits, Near, Retrieved


def rule(t: int, chunk_size: int, window: int) -> list[int]:
    """Chunks whose every token lies before the window of the query at t, which is t - window + 1 ..
    t."""
    edge = t - window + 1
    return [j for j in range(t + 1) if (j + 1) * chunk_size <= edge]


def candidates_of(t: int, limits: Limits) -> list[int]:
    """The chunks of a bank, and those of the rule that are not sinks alone."""
    own = [
        j
        for j in rule(t, limits.chunk_size, limits.window)
        if (j + 1) * limits.chunk_size > limits.sinks
    ]
    return [*range(limits.banked), *(j + limits.banked for j in own)]


def brute_force_as_read(
    near: AsRead,
    far: AsRead | None,
    nearness: Near | None,
    limits: Limits,
    at: Tensor | None = None,
) -> Retrieved:
    """`retrieve_as_read`, a query and a chunk at a time."""
    assert at is None
    (batch, tokens, heads, width), groups = near.queries.shape, near.keys.shape[2]
    chunk = torch.zeros(batch, tokens, groups, limits.top_k, dtype=torch.long)
    found = torch.zeros_like(chunk, dtype=torch.bool)
    since, begins = nearness or (torch.zeros(1, 0), torch.zeros(1, 0))
    for b in range(batch):
        for t in range(tokens):
            allowed = candidates_of(t, limits)
            for g in range(groups):
                mass = torch.zeros(len(allowed), dtype=near.queries.dtype)
                for h in range(g * heads // groups, (g + 1) * heads // groups):
                    scores = []
                    for j in allowed:
                        close_by = nearness is None or bool(
                            begins[b % len(begins), j] >= since[b % len(since), t]
                        )
                        pair = near if close_by or far is None else far
                        scores.append(pair.queries[b, t, h] @ pair.keys[b, j, g] / width**0.5)
                    mass += torch.stack(scores).softmax(0) if scores else 0
                order = sorted(range(len(allowed)), key=lambda i: (-mass[i].item(), i))[
                    : limits.top_k
                ]
                for rank, i in enumerate(order):
                    chunk[b, t, g, rank], found[b, t, g, rank] = allowed[i], True
    return Retrieved(chunk, found)


def assert_same_choice(fast: Retrieved, slow: Retrieved) -> None:
    """Equal; `slow` has K columns, `fast` no more than there are chunks."""
    count = fast.chunk.shape[3]
    assert not slow.found[..., count:].any()
    assert torch.equal(fast.found, slow.found[..., :count])
    assert torch.equal(fast.chunk, slow.chunk[..., :count])


def brute_force(
    queries: Tensor,
    summaries: Tensor,
    limits: Limits,
    at: Tensor | None = None,
    *,
    later_wins: bool = False,
) -> Retrieved:
    """The whole row at once: `at`, the token indices of a call with a state, is None."""
    assert at is None
    top_k = limits.top_k
    batch, tokens, groups, _ = queries.shape
    index = torch.zeros(batch, tokens, groups, top_k, dtype=torch.long)
    found = torch.zeros_like(index, dtype=torch.bool)
    scores = torch.einsum("btge,bjge->btgj", queries, summaries)
    for b in range(batch):
        for t in range(tokens):
            for g in range(groups):
                allowed = candidates_of(t, limits)
                order = sorted(
                    (-scores[b, t, g, j].item(), -j if later_wins else j, j) for j in allowed
                )
                for rank, (*_, j) in enumerate(order[:top_k]):
                    index[b, t, g, rank] = j
                    found[b, t, g, rank] = True
    return Retrieved(index, found)


def assert_only_completed_chunks_outside_the_window(
    retrieved: Retrieved, chunk_size: int, window: int
) -> None:
    """As many as there are, each once, and none that the rule does not allow."""
    top_k = retrieved.chunk.shape[-1]
    for t in range(retrieved.chunk.shape[1]):
        allowed = set(rule(t, chunk_size, window))
        for index, found in zip(
            retrieved.chunk[:, t].flatten(0, 1).tolist(),
            retrieved.found[:, t].flatten(0, 1).tolist(),
            strict=True,
        ):
            chosen = [j for j, there in zip(index, found, strict=True) if there]
            assert set(chosen) <= allowed, (
                f"token {t} retrieved {chosen} of the candidates {sorted(allowed)}"
            )
            assert len(set(chosen)) == len(chosen) == min(top_k, len(allowed))


def assert_earlier_chunk_wins_ties(retrieve: Callable[..., Retrieved]) -> None:
    queries, summaries = torch.ones(1, 24, 1, 2), torch.ones(1, 8, 1, 2)
    summaries[:, 5] = 2.0
    chosen = retrieve(queries, summaries, Limits(3, 0, 3)).chunk[0, -1, 0]
    assert chosen.tolist() == [5, 0, 1]
