"""CUDA's kernel that returns the log-sum-exp, against the plain formula in float64 on the CPU."""

import pytest
import torch
from torch import Tensor

from checks import RELATIVE_RMS, TOLERANCE
from mka.ops import fused
from mka.ops.fused import attention_with_lse

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device; there is none here"
    ),
]
ALLOWED = TOLERANCE | dict.fromkeys((torch.bfloat16, torch.float16), RELATIVE_RMS[torch.bfloat16])
SEEDS = torch.Generator()


def inputs(tokens: int, slots: int, groups: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """2 rows, 4 heads."""
    SEEDS.manual_seed(tokens + slots)
    shapes = (2, tokens, 4, width), (2, slots, groups, width), (2, slots, groups, width)
    q, k, v = (torch.randn(x, generator=SEEDS, dtype=torch.float64) for x in shapes)
    return q, k, v


def masks(kind: str, tokens: int, slots: int) -> Tensor | None:
    """Query 2 sees nothing, where a mask says what is seen."""
    if kind == "causal":
        return None
    shape = {
        "one for all": (tokens, slots),
        "each row's": (2, 1, tokens, slots),
        "each head's": (2, 4, tokens, slots),
    }
    mask = torch.rand(shape[kind], generator=SEEDS) > 0.4
    mask[..., 2, :] = False
    return mask


def results(
    qkv: tuple[Tensor, ...], mask: Tensor | None, device: str, dtype: torch.dtype
) -> list[Tensor]:
    """Values, log-sum-exps where there is something to see, and the gradients of q, k and v, of
    both."""
    leaves = [x.to(device, dtype).requires_grad_() for x in qkv]
    o, lse = attention_with_lse(
        *(x.transpose(1, 2) for x in leaves), None if mask is None else mask.to(device), 0.3
    )
    seen = lse > -torch.inf
    total = o.double().sin().sum() + lse[seen].double().sin().sum()
    assert (~seen).any() == (mask is not None)
    assert (o[~seen] == 0).all()
    return [x.detach().cpu().double() for x in (o, lse[seen], *torch.autograd.grad(total, leaves))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["causal", "one for all", "each row's", "each head's"])
@pytest.mark.parametrize(("tokens", "slots"), [(7, 9), (31, 32), (32, 33), (33, 64), (300, 517)])
@pytest.mark.parametrize(("groups", "width"), [(4, 6), (2, 16), (1, 64), (2, 128)])
def test_values_log_sums_and_gradients(
    groups: int, width: int, tokens: int, slots: int, kind: str, dtype: torch.dtype
) -> None:
    slots = tokens if kind == "causal" else slots
    qkv = inputs(tokens, slots, groups, width)
    mask = masks(kind, tokens, slots)
    wanted, ours = results(qkv, mask, "cpu", torch.float64), results(qkv, mask, "cuda", dtype)
    for a, b in zip(wanted, ours, strict=True):
        error = (b - a).square().mean().sqrt() / a.square().mean().sqrt()
        assert error <= ALLOWED[dtype], f"off by {error:.1e}"


def test_float64_has_no_kernel_and_is_as_right() -> None:
    qkv, mask = inputs(33, 64, 2, 16), masks("one for all", 33, 64)
    assert not fused.is_fused(qkv[0].cuda())
    for a, b in zip(
        *(results(qkv, mask, device, torch.float64) for device in ("cpu", "cuda")), strict=True
    ):
        assert torch.allclose(a, b, rtol=0, atol=TOLERANCE[torch.float64])


def test_inputs_may_lie_anyhow() -> None:
    """Channels apart, and vectors that begin where a kernel does not like it."""
    q, k, v = (x.float().cuda().transpose(1, 2) for x in inputs(40, 50, 2, 16))
    mask = torch.rand(40, 50, generator=SEEDS).cuda() > 0.4
    wanted = attention_with_lse(q, k, v, mask, 0.3)
    shifted = [torch.cat([x[..., :1], x], dim=-1)[..., 1:] for x in (q, k, v)]
    apart = [x.mT.contiguous().mT for x in (q, k, v)]
    for other in (shifted, apart):
        for a, b in zip(attention_with_lse(*other, mask, 0.3), wanted, strict=True):
            assert torch.equal(a, b)


def test_scores_are_not_stored() -> None:
    """4,096 queries and keys of 8 heads would be 512 MiB of scores."""
    q, k, v = (
        torch.randn(1, 8, 4096, 64, device="cuda", dtype=torch.bfloat16).requires_grad_()
        for _ in range(3)
    )
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    o, lse = attention_with_lse(q, k, v, None, 0.125)
    (o.float().sum() + lse.sum()).backward()
    assert torch.cuda.max_memory_allocated() - before < 2**28
