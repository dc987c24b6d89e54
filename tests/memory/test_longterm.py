"""Chunk means, the reading of summaries, and the mask of retrieved tokens."""

import pytest
import torch
from torch import Tensor

from checks import close
from mka.memory.longterm import chunk_means, read_summaries
from mka.memory.search import Limits, Retrieved, retrieve


@pytest.mark.parametrize(
    ("tokens", "chunk_size"), [(1, 1), (7, 7), (6, 7), (23, 3), (24, 3), (25, 1)]
)
@pytest.mark.parametrize("rest", [(4,), (2, 3)])
def test_chunk_means_of_completed_chunks(
    tokens: int, chunk_size: int, rest: tuple[int, ...]
) -> None:
    x = torch.randn(
        2, tokens, *rest, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    means = chunk_means(x, chunk_size)
    assert means.shape == (2, tokens // chunk_size, *rest)
    for j in range(tokens // chunk_size):
        close(means[:, j], x[:, j * chunk_size : (j + 1) * chunk_size].mean(1))


@pytest.mark.parametrize(("chunk_size", "sinks"), [(3, 1), (3, 4), (1, 4), (7, 4)])
def test_sinks_are_no_part_of_a_chunk_mean(chunk_size: int, sinks: int) -> None:
    x = torch.randn(2, 23, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = chunk_means(x, chunk_size, sinks)
    for j in range(23 // chunk_size):
        tokens = [s for s in range(j * chunk_size, (j + 1) * chunk_size) if s >= sinks]
        close(means[:, j], x[:, tokens].mean(1) if tokens else torch.zeros_like(means[:, j]))


def test_chunk_means_are_float32_of_bfloat16() -> None:
    x = torch.tensor([1.0, 1 + 2**-7], dtype=torch.bfloat16).view(1, 2, 1)
    assert chunk_means(x, 2).item() == 1 + 2**-8


def reading(
    tokens: int = 20, chunk_size: int = 3, window: int = 4, top_k: int = 3
) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(2, tokens, 5), (2, tokens // chunk_size, 5), (2, tokens // chunk_size, 6)]
    u, keys, means = (
        torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes
    )
    found = retrieve(u.unsqueeze(2), keys.unsqueeze(2), Limits(chunk_size, window, top_k))
    return u, keys, means, *found


def by_hand(u: Tensor, keys: Tensor, means: Tensor, index: Tensor, found: Tensor) -> Tensor:
    """softmax over the found chunks, one query at a time; zeros where there are none."""
    rows = []
    for b in range(u.shape[0]):
        for t in range(u.shape[1]):
            chosen = index[b, t, 0][found[b, t, 0]]
            odds = (keys[b, chosen] @ u[b, t]).exp()
            weights = odds / odds.sum() if len(chosen) else odds
            rows.append(weights @ means[b, chosen])
    return torch.stack(rows).view(u.shape[0], u.shape[1], -1)


@pytest.mark.parametrize("top_k", [1, 3, 50])
def test_read_summaries_is_an_explicit_softmax_forward_and_backward(top_k: int) -> None:
    u, keys, means, index, found = reading(top_k=top_k)
    fast, slow = (
        read_summaries(u, keys, means, Retrieved(index, found)),
        by_hand(u, keys, means, index, found),
    )
    close(fast, slow)
    direction = torch.randn(
        fast.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    grads = [torch.autograd.grad(y, [u, keys, means], direction) for y in (fast, slow)]
    for a, b in zip(*grads, strict=True):
        close(a, b)


def test_zeros_and_no_gradient_where_nothing_is_found() -> None:
    u, keys, means, index, found = reading()
    read = read_summaries(u, keys, means, Retrieved(index, found))
    nothing = ~found.any(-1).squeeze(2)
    assert nothing[:, :6].all()
    assert not nothing[:, 6:].any()
    assert (read[nothing] == 0).all()
    grads = torch.autograd.grad(read[nothing].sum(), [u, keys, means])
    assert all((grad == 0).all() for grad in grads)


def test_scores_far_apart_stay_finite() -> None:
    u, keys, means, index, found = (x.detach() for x in reading())
    read = read_summaries(u * 1e5, keys, means, Retrieved(index, found))
    best = means[torch.arange(2)[:, None], index[:, :, 0, 0]]
    close(read[:, 6:], best[:, 6:])
