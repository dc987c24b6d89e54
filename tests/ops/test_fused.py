"""Attention with its log-sum-exp against the plain formula, on the fused kernel and where there is
none."""

import pytest
import torch
from torch import Tensor

from checks import RELATIVE_RMS
from mka.ops import fused
from mka.ops.fused import attention_with_lse

every_way = pytest.mark.parametrize("devices", [("cpu",), ()], ids=["fused", "plain"])


@pytest.fixture(autouse=True)
def on(devices: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "FUSED", devices)


def inputs(
    groups: int, causal: bool, width: int = 6
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """2 rows, 4 heads, 7 queries; under a mask query 2 sees nothing."""
    generator = torch.Generator().manual_seed(groups)
    slots = 7 if causal else 9
    shapes = (2, 4, 7, width), (2, groups, slots, width), (2, groups, slots, width)
    q, k, v = (
        torch.randn(x, generator=generator, dtype=torch.float64).requires_grad_() for x in shapes
    )
    mask = torch.rand(2, 1, 7, 9, generator=generator) > 0.4
    mask[:, :, 2] = False
    return q, k, v, None if causal else mask


def plain(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    k, v = (x.repeat_interleave(4 // k.shape[1], dim=1) for x in (k, v))
    seen = torch.ones(7, 7).tril().bool() if mask is None else mask
    scores = (q @ k.mT * 0.3).masked_fill(~seen, -torch.inf)
    return scores.softmax(-1).nan_to_num() @ v, scores.logsumexp(-1)


@every_way
@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("causal", [True, False])
def test_values_log_sums_and_the_gradients_of_both(
    groups: int, causal: bool, devices: tuple[str, ...]
) -> None:
    q, k, v, mask = inputs(groups, causal)
    for ours, theirs in zip(
        attention_with_lse(q, k, v, mask, 0.3), plain(q, k, v, mask), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-13)

    def finite(*qkv: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = attention_with_lse(*qkv, mask, 0.3)
        return o, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(finite, (q, k, v))
    assert torch.autograd.gradcheck(lambda *qkv: finite(*qkv)[0], (q, k, v))
    assert torch.autograd.gradcheck(lambda *qkv: finite(*qkv)[1], (q, k, v))


@every_way
def test_the_custom_operator(devices: tuple[str, ...]) -> None:
    q, k, v, mask = inputs(2, causal=False)
    torch.library.opcheck(torch.ops.mka.attention_with_lse.default, (q, k, v, mask, 0.3))


@every_way
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_stay_near_float64(dtype: torch.dtype, devices: tuple[str, ...]) -> None:
    exact = inputs(2, causal=False, width=16)
    half = [x.detach().to(dtype).requires_grad_() for x in exact[:3]]
    results = []
    for q, k, v in (exact[:3], half):
        o, lse = attention_with_lse(q, k, v, exact[3], 0.3)
        seen = lse > -torch.inf
        total = o.double().sin().sum() + lse[seen].double().sin().sum()
        results.append([o, lse[seen], *torch.autograd.grad(total, [q, k, v])])
    assert results[1][0].dtype == dtype
    assert results[1][1].dtype == torch.float32
    for wanted, ours in zip(*results, strict=True):
        error = (ours.double() - wanted).square().mean().sqrt() / wanted.square().mean().sqrt()
        assert error <= RELATIVE_RMS[torch.bfloat16]


@every_way
def test_inputs_may_lie_anyhow(devices: tuple[str, ...]) -> None:
    q, k, v, mask = inputs(4, causal=False)
    across = [
        x.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_()
        for x in (q, k, v)
    ]
    ours, theirs = attention_with_lse(*across, mask, 0.3), attention_with_lse(q, k, v, mask, 0.3)
    assert torch.equal(ours[0], theirs[0])
    for a, b in zip(
        torch.autograd.grad(ours[0].sum(), across),
        torch.autograd.grad(theirs[0].sum(), [q, k, v]),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=0, atol=1e-13)
