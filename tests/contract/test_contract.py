"""Every mechanism, in every variant its options allow, keeps every promise of the contract."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import checks
from mka.attention import CausalAttention

every_case = pytest.mark.parametrize(("kind", "variant"), checks.CASES)
TOKENS = 23
# Blocks of the windowed attention are at least 64 tokens: these lengths and windows cross several
# of them.
LONG = [(150, 5), (129, 64), (163, 70), (64, 63)]


@every_case
def test_gradient_from_the_future_is_exactly_zero(kind: str, variant: str) -> None:
    checks.assert_no_gradient_from_future(checks.make(kind, variant), checks.rows(2, TOKENS))


@every_case
@pytest.mark.parametrize("huge", [-1e3, 1e30])
def test_huge_values_in_the_future_change_nothing(kind: str, variant: str, huge: float) -> None:
    checks.assert_future_values_ignored(checks.make(kind, variant), checks.rows(2, TOKENS), huge)


@every_case
@pytest.mark.parametrize("huge", [1e19, 1e30])
def test_huge_values_in_the_future_change_nothing_in_float32(
    kind: str, variant: str, huge: float
) -> None:
    # Products of such values overflow to infinity, and infinity times zero must not reach the past
    # as NaN.
    checks.assert_future_values_ignored(
        checks.make(kind, variant, torch.float32), checks.rows(2, TOKENS, torch.float32), huge
    )


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_the_largest_values_in_the_future_change_nothing(
    kind: str, variant: str, dtype: torch.dtype
) -> None:
    checks.assert_largest_values_ignored(
        checks.make(kind, variant, dtype), checks.rows(2, TOKENS, dtype)
    )


@every_case
@pytest.mark.parametrize("side", ["left", "right", "interior"])
def test_padding_changes_nothing(kind: str, variant: str, side: str) -> None:
    t = torch.arange(TOKENS)
    lengths = torch.tensor([TOKENS, 17, 1])[:, None]
    masks = {
        "left": t >= TOKENS - lengths,
        "right": t < lengths,
        "interior": (t * 7) % TOKENS < lengths,
    }
    checks.assert_padding_ignored(checks.make(kind, variant), checks.rows(3, TOKENS), masks[side])


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    st.lists(st.booleans(), min_size=2 * TOKENS, max_size=2 * TOKENS), st.sampled_from(checks.CASES)
)
def test_any_padding_changes_nothing(bits: list[bool], case: tuple[str, str]) -> None:
    valid = torch.tensor(bits).view(2, TOKENS)
    checks.assert_padding_ignored(checks.make(*case), checks.rows(2, TOKENS), valid)


@every_case
def test_batch_mates_change_nothing(kind: str, variant: str) -> None:
    checks.assert_batch_mates_ignored(checks.make(kind, variant), checks.rows(4, TOKENS))


@every_case
@pytest.mark.parametrize("tokens", [1, 2, TOKENS])
def test_equals_the_naive_twin_forward_and_backward(kind: str, variant: str, tokens: int) -> None:
    checks.assert_equals_naive(checks.make(kind, variant), checks.rows(2, tokens))


@every_case
def test_equals_the_naive_twin_with_padding(kind: str, variant: str) -> None:
    valid = torch.rand(2, TOKENS, generator=torch.Generator().manual_seed(3)) > 0.3
    checks.assert_equals_naive(checks.make(kind, variant), checks.rows(2, TOKENS), valid)


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in checks.CASES}))
@pytest.mark.parametrize(("tokens", "window"), LONG)
def test_equals_the_naive_twin_over_several_blocks(kind: str, tokens: int, window: int) -> None:
    checks.assert_equals_naive(
        checks.make(kind, local_window=window, chunk_size=7), checks.rows(1, tokens)
    )


@every_case
def test_equals_the_naive_twin_in_float32(kind: str, variant: str) -> None:
    # Every candidate is retrieved, so that rounding cannot choose another chunk.
    attn = checks.make(kind, variant, torch.float32, top_k=100 if variant != "literal" else 0)
    checks.assert_equals_naive(attn, checks.rows(2, TOKENS, torch.float32))


@every_case
@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_stays_near_float64(kind: str, variant: str, autocast: bool) -> None:
    changes: dict[str, Any] = {"top_k": 100 if variant != "literal" else 0}
    exact = checks.make(kind, variant, **changes)(checks.rows(2, TOKENS))[0]
    attn = checks.make(kind, variant, torch.float32 if autocast else torch.bfloat16, **changes)
    attn.load_state_dict(checks.make(kind, variant, **changes).state_dict())
    x = checks.rows(2, TOKENS, torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y, _ = attn(x)
    error = (y.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error <= checks.RELATIVE_RMS[torch.bfloat16]


@every_case
def test_gradcheck(kind: str, variant: str) -> None:
    attn = checks.make(kind, variant, local_window=3, chunk_size=2)
    names = [name for name, _ in attn.named_parameters()]

    def outputs(x: torch.Tensor, *values: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(attn, dict(zip(names, values, strict=True)), (x,))[0]

    inputs = [checks.rows(1, 9), *(p.detach().clone() for p in attn.parameters())]
    assert torch.autograd.gradcheck(outputs, [x.requires_grad_() for x in inputs], fast_mode=True)


@every_case
def test_every_parameter_gets_a_gradient(kind: str, variant: str) -> None:
    attn = checks.make(kind, variant)
    attn(checks.rows(2, TOKENS))[0].square().sum().backward()
    without = [name for name, p in attn.named_parameters() if p.grad is None or not p.grad.any()]
    # A constant added to every key moves all scores of a query alike: softmax has no gradient for
    # it.
    shift_free = {"k_proj.bias", "k_up_proj.bias", "k_rope_proj.bias"}
    assert not [name for name in without if name not in shift_free]


@every_case
def test_positions_default_to_the_count_of_valid_tokens(kind: str, variant: str) -> None:
    attn, x = checks.make(kind, variant), checks.rows(2, TOKENS)
    valid = torch.ones(2, TOKENS, dtype=torch.bool)
    valid[0, :4] = False
    counted = (valid.cumsum(1) - 1).clamp(min=0)
    checks.close(attn(x, valid=valid)[0], attn(x, positions=counted, valid=valid)[0])
    checks.assert_equals_naive(attn, x, valid=valid, positions=counted * 3 + 11)


@every_case
def test_the_signature_is_small(kind: str, variant: str) -> None:
    attn = checks.make(kind, variant)
    assert isinstance(attn, CausalAttention)
    y, state = attn(checks.rows(2, TOKENS))
    assert y.shape == (2, TOKENS, checks.HIDDEN_SIZE)
    assert state is None
