"""Packing and unpacking are inverse to each other, for any padding."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mka.ops.packing import packing

any_padding = given(
    st.integers(1, 12).flatmap(
        lambda tokens: st.lists(
            st.lists(st.booleans(), min_size=tokens, max_size=tokens), min_size=1, max_size=4
        )
    ),
    st.lists(st.integers(1, 3), max_size=2),
)
quickly = settings(max_examples=60, deadline=None, derandomize=True)


def numbered(valid: Tensor, rest: list[int]) -> Tensor:
    """Every number differs, and none is zero."""
    shape = (*valid.shape, *rest)
    return torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float64).view(shape)


def spread(valid: Tensor, x: Tensor) -> Tensor:
    return valid.reshape(*valid.shape, *[1] * (x.dim() - 2)).expand_as(x)


@quickly
@any_padding
def test_unpack_undoes_pack(bits: list[list[bool]], rest: list[int]) -> None:
    valid = torch.tensor(bits)
    x, rows = numbered(valid, rest), packing(valid)
    assert torch.equal(rows.unpack(rows.pack(x)), x.where(spread(valid, x), 0))


@quickly
@any_padding
def test_pack_undoes_unpack(bits: list[list[bool]], rest: list[int]) -> None:
    valid = torch.tensor(bits)
    y, rows = numbered(valid, rest), packing(valid)
    assert torch.equal(rows.pack(rows.unpack(y)), y.where(spread(rows.kept, y), 0))


@quickly
@any_padding
def test_valid_tokens_come_first_and_in_order(bits: list[list[bool]], rest: list[int]) -> None:
    valid = torch.tensor(bits)
    x, rows = numbered(valid, rest), packing(valid)
    packed = rows.pack(x)
    for row, kept in enumerate(valid):
        count = int(kept.sum())
        assert torch.equal(packed[row, :count], x[row, kept])
        assert (packed[row, count:] == 0).all()
        assert rows.kept[row].tolist() == [True] * count + [False] * (len(kept) - count)


@quickly
@any_padding
def test_what_stands_at_padding_never_comes_through(
    bits: list[list[bool]], rest: list[int]
) -> None:
    valid = torch.tensor(bits)
    x, rows = numbered(valid, rest), packing(valid)
    poisoned = x.where(spread(valid, x), torch.nan).requires_grad_()
    out = rows.unpack(rows.pack(poisoned))
    assert out.isfinite().all()
    (grad,) = torch.autograd.grad(out.sum(), poisoned)
    assert torch.equal(grad, spread(valid, x).double())
