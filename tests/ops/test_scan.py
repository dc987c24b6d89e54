"""The session scan against a loop over tokens, forward and backward."""

import pytest
import torch
from torch import Tensor

from checks import close
from mka.ops import scan
from mka.ops.scan import causal_average, decayed_sum

LENGTHS = [1, 2, 7, 8, 9, 15, 16, 17, 63, 64, 65, 129, 255, 256, 257, 1000, 1025]
DECAYS = torch.tensor([1e-3, 0.1, 0.5, 0.9, 0.999, 0.99999], dtype=torch.float64)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def inputs(tokens: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(2, tokens, len(DECAYS), generator=generator, dtype=torch.float64)
    return x.to(dtype).requires_grad_(), DECAYS.to(dtype).requires_grad_()


def loop(x: Tensor, decay: Tensor) -> Tensor:
    """Sums and weights token by token; the specification's m / (1 - a^n) loses digits where a is
    near 1."""
    total, weight, means = torch.zeros_like(x[:, 0]), torch.zeros_like(decay), []
    for t in range(x.shape[1]):
        total, weight = decay * total + x[:, t], decay * weight + 1
        means.append(total / weight)
    return torch.stack(means, dim=1)


@both_dtypes
@pytest.mark.parametrize("tokens", LENGTHS)
def test_equals_the_loop_forward_and_backward(tokens: int, dtype: torch.dtype) -> None:
    x, decay = inputs(tokens, dtype)
    exact_x, exact_decay = (p.detach().double().requires_grad_() for p in (x, decay))
    fast, slow = causal_average(x, decay), loop(exact_x, exact_decay)
    close(fast, slow.to(dtype))
    direction = torch.randn(
        slow.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    grads = torch.autograd.grad(fast, [x, decay], direction.to(dtype))
    expected = torch.autograd.grad(slow, [exact_x, exact_decay], direction)
    for a, b in zip(grads, expected, strict=True):
        close(a, b.to(dtype))


def test_the_loop_is_the_formula_of_the_specification() -> None:
    x, _ = inputs(50)
    decay = torch.linspace(0.1, 0.95, len(DECAYS), dtype=torch.float64)
    m = torch.zeros_like(x[:, 0])
    for t in range(50):
        m = decay * m + (1 - decay) * x[:, t]
        close(causal_average(x, decay)[:, t], m / (1 - decay ** (t + 1)))


@pytest.mark.parametrize("tokens", [1, 2, 9, 40])
def test_gradcheck_of_input_and_decay(tokens: int) -> None:
    assert torch.autograd.gradcheck(causal_average, inputs(tokens), fast_mode=True)


@pytest.mark.parametrize("size", [2, 3, 16, 64, 1000])
def test_the_size_of_the_blocks_does_not_matter(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, decay = inputs(130)
    expected = causal_average(x, decay)
    wanted = torch.autograd.grad(expected.square().sum(), [x, decay])
    monkeypatch.setattr(scan, "block_size", lambda tokens: size)
    blocked = causal_average(x, decay)
    close(blocked, expected)
    for a, b in zip(torch.autograd.grad(blocked.square().sum(), [x, decay]), wanted, strict=True):
        close(a, b)


@pytest.mark.parametrize("cut", [1, 8, 63, 64, 100, 255])
def test_a_sum_can_be_carried_from_one_part_to_the_next(cut: int) -> None:
    x, decay = (p.detach() for p in inputs(256))
    first, second = decayed_sum(x[:, :cut], decay), decayed_sum(x[:, cut:], decay)
    steps = torch.arange(1, 257 - cut, dtype=x.dtype)[:, None]
    carried = second + decay**steps * first[:, -1:]
    close(torch.cat([first, carried], dim=1), decayed_sum(x, decay))


@pytest.mark.parametrize("tokens", [1, 8, 65, 300])
def test_reverse_is_the_sum_of_the_reversed_row(tokens: int) -> None:
    x, decay = (p.detach() for p in inputs(tokens))
    close(decayed_sum(x, decay, reverse=True), decayed_sum(x.flip(1), decay).flip(1))


@both_dtypes
@pytest.mark.parametrize("future", [1e30, -1e30, float("inf"), float("nan")])
def test_the_future_changes_no_bit_of_the_past(future: float, dtype: torch.dtype) -> None:
    x, decay = (p.detach() for p in inputs(150, dtype))
    mean = causal_average(x, decay)
    for t in (0, 6, 7, 8, 63, 64, 100, 148):
        changed = x.clone()
        changed[:, t + 1 :] = future
        assert torch.equal(causal_average(changed, decay)[:, : t + 1], mean[:, : t + 1])


def test_gradient_from_the_future_is_exactly_zero() -> None:
    x, decay = inputs(70)
    mean = causal_average(x, decay)
    for t in (0, 7, 8, 40, 68):
        (grad,) = torch.autograd.grad(mean[:, t].sum(), x, retain_graph=True)
        assert (grad[:, t + 1 :] == 0).all()
        assert (grad[:, t] > 0).all()


@both_dtypes
def test_a_constant_is_its_own_average_at_every_token(dtype: torch.dtype) -> None:
    _, decay = inputs(1000, dtype)
    x = torch.full((1, 1000, len(DECAYS)), 3.0, dtype=dtype)
    close(causal_average(x, decay), x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_averaged_in_float32_even_under_autocast(dtype: torch.dtype) -> None:
    x, decay = (p.detach().to(dtype) for p in inputs(300))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mean = causal_average(x, decay)
    close(mean, causal_average(x.float(), decay.float()))
