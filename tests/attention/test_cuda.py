"""On a CUDA device every mechanism gives what it gives on the CPU: outputs, gradients, and token by
token."""

import copy

import pytest
import torch

import checks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device; there is none here"
    ),
]


@pytest.mark.parametrize(("kind", "variant"), checks.CASES)
def test_the_device_changes_nothing(kind: str, variant: str) -> None:
    attn, x = checks.make(kind, variant), checks.rows(2, 40)
    there = copy.deepcopy(attn).cuda()
    assert_same(attn, x, there)


@pytest.mark.parametrize("kind", ["mka", "fmka"])
def test_long_rows(kind: str) -> None:
    """Enough queries for chunk by chunk, several folded blocks of the window."""
    attn, x = checks.make(kind), checks.rows(2, 700)
    assert_same(attn, x, copy.deepcopy(attn).cuda())


@pytest.mark.parametrize(("kind", "variant"), checks.CASES)
@torch.no_grad()
def test_token_by_token(kind: str, variant: str) -> None:
    attn, x = checks.make(kind, variant), checks.rows(2, 30)
    there = copy.deepcopy(attn).cuda()
    state = there.initial_state(2, x.dtype, "cuda")
    parts = [there(x[:, t : t + 1].cuda(), state=state)[0] for t in range(30)]
    checks.close(torch.cat(parts, 1).cpu(), attn(x)[0])


def assert_same(attn: torch.nn.Module, x: torch.Tensor, there: torch.nn.Module) -> None:
    here, far = x.clone().requires_grad_(), x.cuda().requires_grad_()
    y, z = attn(here)[0], there(far)[0]
    checks.close(z.cpu(), y)
    for a, b in zip(
        torch.autograd.grad(y.square().sum(), [here, *attn.parameters()], allow_unused=True),
        torch.autograd.grad(z.square().sum(), [far, *there.parameters()], allow_unused=True),
        strict=True,
    ):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            checks.close(b.cpu(), a)
