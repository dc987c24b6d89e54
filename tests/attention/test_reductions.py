"""Guarantee 4: where two mechanisms are the same computation, they give the same outputs and gradients."""

from typing import Any

import pytest
import torch

import checks
from mka.attention import CausalAttention, build_attention

TOKENS = 40
SHUT = {"mka": {"session_stride": 4, "top_k": 2}, "fmka": {"index_size": 3, "top_k": 2}}


def build(kind: str, **options: Any) -> CausalAttention:
    attn = build_attention(kind, hidden_size=checks.HIDDEN_SIZE, num_heads=checks.NUM_HEADS, **options).double()
    torch.manual_seed(1)
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return attn


def assert_same(a: CausalAttention, b: CausalAttention) -> None:
    """With the projections of b in a: outputs, and the gradients of what both have."""
    missing, unexpected = a.load_state_dict(b.state_dict(), strict=False)
    assert not unexpected
    assert not [name for name in missing if name.endswith("_proj.weight") and not name.startswith("index")]
    x = checks.rows(2, TOKENS).requires_grad_()
    outputs = [attn(x)[0] for attn in (a, b)]
    checks.close(*outputs)
    shared = [name for name, _ in b.named_parameters()]
    grads = [
        torch.autograd.grad(y.square().sum(), [x, *(attn.get_parameter(name) for name in shared)])
        for attn, y in zip((a, b), outputs, strict=True)
    ]
    for pair in zip(*grads, strict=True):
        checks.close(*pair)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(("groups", "twin"), [(checks.NUM_HEADS, "mha"), (1, "mqa")])
@pytest.mark.parametrize("bias", [False, True])
def test_gqa_at_its_two_ends(groups: int, twin: str, window: int | None, bias: bool) -> None:
    options = {"local_window": window, "bias": bias, "rotary": checks.ROTARY}
    assert_same(build("gqa", num_kv_heads=groups, **options), build(twin, **options))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("kind", SHUT)
@pytest.mark.parametrize("rotary", [None, checks.ROTARY])
def test_a_shut_gate_without_window_is_gqa(kind: str, groups: int, rotary: Any) -> None:
    options = {"num_kv_heads": groups, "local_window": None, "rotary": rotary}
    attn = build(kind, **options, **SHUT[kind], chunk_size=3)
    attn.get_buffer("router.gate").zero_()
    assert_same(attn, build("gqa", **options))


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("kind", SHUT)
def test_without_session_and_long_term_the_local_level_is_all_there_is(kind: str, window: int | None) -> None:
    options = {"num_kv_heads": 2, "local_window": window}
    assert_same(build(kind, **options, session_decay=None, top_k=0), build("gqa", **options))


@pytest.mark.parametrize("kind", ["mha", "mqa", "gqa", "mla", "mka", "fmka"])
def test_a_window_as_long_as_the_row_is_no_window(kind: str) -> None:
    options = checks.options_of(kind, {"num_kv_heads": 2, "top_k": 0})
    windowed, whole = (build(kind, local_window=window, **options) for window in (TOKENS, None))
    assert_same(windowed, whole)
