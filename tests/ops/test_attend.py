"""The softmax seam against a dense masked softmax written out by hand."""

import pytest
import torch
from torch import Tensor

from checks import close
from mka.ops.attend import MIN_BLOCK, attend_causal, attend_masked

WINDOWS = [1, 2, MIN_BLOCK - 1, MIN_BLOCK, MIN_BLOCK + 1, 2 * MIN_BLOCK, 100, None]
LENGTHS = [1, 63, 64, 65, 127, 128, 129, 200, 1000]
EDGES = [(tokens, window) for tokens in LENGTHS for window in WINDOWS if tokens < 1000 or window in (63, 64, 65)]


def heads(
    tokens: int,
    num_heads: int = 4,
    groups: int = 2,
    size: int = 6,
    v_size: int = 6,
    dtype: torch.dtype = torch.float64,
    slots: int | None = None,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    slots = tokens if slots is None else slots
    shapes = [(2, tokens, num_heads, size), (2, slots, groups, size), (2, slots, groups, v_size)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """mask (T, S) or (B, T, G, S)."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bths", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    seen = mask[None, :, None] if mask.dim() == 2 else mask.repeat_interleave(repeats, dim=2)
    odds = (scores - scores.detach().amax(-1, keepdim=True)).exp() * seen
    total = odds.sum(-1, keepdim=True)
    return torch.einsum("bths,bshd->bthd", odds / torch.where(total == 0, 1, total), v)


def causal(tokens: int, window: int | None) -> Tensor:
    t = torch.arange(tokens)
    distance = t[:, None] - t
    return (distance >= 0) & (distance < (tokens if window is None else window))


def same_outputs_and_gradients(fast: Tensor, slow: Tensor, inputs: list[Tensor]) -> None:
    close(fast, slow)
    direction = torch.randn(fast.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(fast.dtype)
    for a, b in zip(*(torch.autograd.grad(y, inputs, direction) for y in (fast, slow)), strict=True):
        close(a, b)


@pytest.mark.parametrize(("tokens", "window"), EDGES)
def test_windows_and_lengths_around_the_blocks(tokens: int, window: int | None) -> None:
    q, k, v = heads(tokens)
    same_outputs_and_gradients(attend_causal(q, k, v, window), dense(q, k, v, causal(tokens, window)), [q, k, v])


@pytest.mark.parametrize("window", [1, 5, 64, 70, None])
@pytest.mark.parametrize(("num_heads", "groups"), [(4, 4), (4, 1), (6, 3), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_groups(window: int | None, num_heads: int, groups: int, dtype: torch.dtype) -> None:
    q, k, v = heads(133, num_heads, groups, dtype=dtype)
    same_outputs_and_gradients(attend_causal(q, k, v, window), dense(q, k, v, causal(133, window)), [q, k, v])


@pytest.mark.parametrize("window", [None, 3, 65])
@pytest.mark.parametrize("v_size", [1, 4, 8])
def test_values_narrower_than_keys(window: int | None, v_size: int) -> None:
    q, k, v = heads(130, size=8, v_size=v_size)
    out = attend_causal(q, k, v, window)
    assert out.shape == (2, 130, 4, v_size)
    same_outputs_and_gradients(out, dense(q, k, v, causal(130, window)), [q, k, v])


@pytest.mark.parametrize("window", [None, 3])
def test_scale(window: int | None) -> None:
    q, k, v = heads(70)
    close(attend_causal(q, k, v, window, scale=0.7), dense(q, k, v, causal(70, window), scale=0.7))


@pytest.mark.parametrize("window", [None, 1, 7, 63, 64, 65])
def test_values_beyond_the_window_and_in_the_future_have_no_weight(window: int | None) -> None:
    tokens, t = 200, 131
    q, k, v = heads(tokens, num_heads=2, groups=2)
    (reached,) = torch.autograd.grad(attend_causal(q, k, v, window)[:, t].sum(), v)
    expected = causal(tokens, window)[t]
    assert torch.equal(reached.abs().sum((0, 2, 3)) > 0, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("per_head", [False, True])
def test_masked_rows_that_see_nothing_give_zeros_and_finite_gradients(dtype: torch.dtype, per_head: bool) -> None:
    q, k, v = heads(19, dtype=dtype, slots=11)
    shape = (2, 19, 2, 11) if per_head else (19, 11)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.3
    empty = torch.zeros(19, dtype=torch.bool)
    empty[[0, 1, 7, 18]] = True
    mask = mask & (~empty[None, :, None, None] if per_head else ~empty[:, None])
    out = attend_masked(q, k, v, mask)
    assert (out[:, empty] == 0).all()
    grads = torch.autograd.grad(out.sum(), [q, k, v], retain_graph=True)
    assert all(grad.isfinite().all() for grad in grads)
    same_outputs_and_gradients(out, dense(q, k, v, mask), [q, k, v])


def test_a_mask_with_no_true_at_all() -> None:
    q, k, v = heads(5, slots=3)
    out = attend_masked(q, k, v, torch.zeros(5, 3, dtype=torch.bool))
    assert (out == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), [q, k, v]))
