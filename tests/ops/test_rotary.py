"""Rotary embeddings: complex multiplication, and scores that depend on distances alone."""

import pytest
import torch
from torch import Tensor

from checks import close
from mka.ops.rotary import RotaryEmbedding


def heads(size: int, tokens: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        2, tokens, 3, size, generator=torch.Generator().manual_seed(size), dtype=torch.float64
    ).to(dtype)


@pytest.mark.parametrize("size", [2, 4, 10, 64])
@pytest.mark.parametrize("base", [10.0, 10000.0])
def test_equals_complex_multiplication(size: int, base: float) -> None:
    x, positions = heads(size), torch.tensor([0, 1, 5, 2, 100, 4095, 7])
    frequencies = torch.tensor(
        [base ** (-2 * i / size) for i in range(size // 2)], dtype=torch.float64
    )
    angle = positions[:, None].double() * frequencies
    pairs = torch.complex(x[..., : size // 2], x[..., size // 2 :])
    turned = pairs * torch.polar(torch.ones_like(angle), angle)[None, :, None]
    close(RotaryEmbedding(size, base)(x, positions), torch.cat([turned.real, turned.imag], dim=-1))


@pytest.mark.parametrize("shift", [1, 17, 1000])
def test_scores_depend_on_the_distance_alone(shift: int) -> None:
    rotary, q, k = RotaryEmbedding(8), heads(8), heads(8).flip(0)
    t = torch.arange(7)

    def scores(first: int) -> Tensor:
        return torch.einsum("bthd,bshd->bhts", rotary(q, t + first), rotary(k, t + first))

    close(scores(shift), scores(0))


def test_lengths_are_kept_and_position_zero_changes_nothing() -> None:
    rotary, x = RotaryEmbedding(8), heads(8)
    close(rotary(x, torch.arange(7) * 31).norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(rotary(x, torch.zeros(7, dtype=torch.long)), x)


def test_each_row_has_its_own_positions() -> None:
    rotary, x = RotaryEmbedding(6), heads(6)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [9, 9, 2, 0, 1, 70, 3]])
    rotated = rotary(x, positions)
    for row in range(2):
        close(rotated[row : row + 1], rotary(x[row : row + 1], positions[row]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_angles_are_computed_in_float32_whatever_the_dtype_and_autocast(dtype: torch.dtype) -> None:
    x, positions = heads(8, dtype=dtype), torch.arange(1000, 1007)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rotated = RotaryEmbedding(8)(x, positions)
    assert torch.equal(rotated, RotaryEmbedding(8)(x.float(), positions).to(dtype))


@pytest.mark.parametrize("size", [-2, 0, 1, 3, 7])
def test_an_odd_head_is_refused_in_one_line(size: int) -> None:
    with pytest.raises(ValueError, match=rf"^head_dim is {size}; .*even number of at least 2$"):
        RotaryEmbedding(size)
