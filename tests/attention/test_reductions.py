"""Guarantee 4: where two mechanisms are the same computation, they give the same outputs and
gradients."""

from typing import Any

import pytest
import torch

import checks
import checks_state
from mka.attention import CausalAttention, build_attention

TOKENS = 40
SHUT = {
    "mka": {"mix": "routed", "session_stride": 4, "top_k": 2},
    "fmka": {"index_size": 3, "top_k": 2},
}


def build(kind: str, **options: Any) -> CausalAttention:
    attn = build_attention(
        kind, hidden_size=checks.HIDDEN_SIZE, num_heads=checks.NUM_HEADS, **options
    ).double()
    torch.manual_seed(1)
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return attn


def assert_same(a: CausalAttention, b: CausalAttention) -> None:
    """With the projections of b in a: outputs, and the gradients of what both have."""
    missing, unexpected = a.load_state_dict(b.state_dict(), strict=False)
    assert not unexpected
    assert not [
        name for name in missing if name.endswith("_proj.weight") and not name.startswith("index")
    ]
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


def with_all_retrieved(
    rotary: Any, tokens: int, window: int, chunk_size: int, sinks: int
) -> CausalAttention:
    options = {
        "local_window": window,
        "chunk_size": chunk_size,
        "sink_tokens": sinks,
        "rotary": rotary,
    }
    attn = build(
        "mka", num_kv_heads=2, top_k=1 + tokens // chunk_size, session_decay=None, **options
    )
    for name in ("weight", "bias"):
        torch.nn.init.zeros_(attn.get_parameter(f"router.output.{name}"))
    return attn


@pytest.mark.parametrize("rotary", [None, checks.ROTARY])
@pytest.mark.parametrize(
    ("tokens", "window", "chunk_size", "sinks"),
    [(40, 5, 3, 4), (40, 7, 1, 2), (37, 5, 16, 4), (150, 6, 4, 0), (200, 70, 7, 4), (40, 1, 2, 0)],
)
def test_joint_with_everything_retrieved_is_full_attention(
    rotary: Any, tokens: int, window: int, chunk_size: int, sinks: int
) -> None:
    """Forward, backward, and in calls: window, sinks and chunks together are every token, each
    once."""
    attn = with_all_retrieved(rotary, tokens, window, chunk_size, sinks)
    full = build("gqa", num_kv_heads=2, rotary=rotary)
    full.load_state_dict(
        {name: value for name, value in attn.state_dict().items() if name in full.state_dict()}
    )
    x = checks.rows(2, tokens).requires_grad_()
    outputs = [each(x)[0] for each in (attn, full)]
    checks.close(*outputs)
    direction = checks.rows(2, tokens, seed=3)
    shared = [name for name, _ in full.named_parameters()]
    grads = [
        torch.autograd.grad(y, [x, *(each.get_parameter(name) for name in shared)], direction)
        for each, y in zip((attn, full), outputs, strict=True)
    ]
    for pair in zip(*grads, strict=True):
        checks.close(*pair)
    with torch.no_grad():
        for cuts in ((1,), (tokens // 2,), (3, 4, 20), range(1, tokens)):
            checks.close(checks_state.in_calls(attn, x, cuts)[0], outputs[1])


@pytest.mark.parametrize("rotary", [None, checks.ROTARY])
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("off", ["options", "biases"])
def test_joint_with_its_memories_off_is_windowed_attention_with_sinks(
    rotary: Any, sinks: int, off: str
) -> None:
    options = {"num_kv_heads": 2, "local_window": 7, "sink_tokens": sinks, "rotary": rotary}
    none = {"session_decay": None, "top_k": 0}
    attn = build(
        "mka", **options, **(none if off == "options" else {"chunk_size": 1, "session_stride": 3})
    )
    if off == "biases":
        torch.nn.init.zeros_(attn.get_parameter("router.output.weight"))
        with torch.no_grad():
            biases = torch.tensor([0.0, -torch.inf, -torch.inf]).repeat(checks.NUM_HEADS)
            attn.get_parameter("router.output.bias").copy_(biases)
    assert_same(attn, build("gqa", **options))


@pytest.mark.parametrize("rotary", [None, checks.ROTARY])
def test_a_shut_gate_of_joint_mka_shuts_the_session_alone(rotary: Any) -> None:
    """As after a conversion: with everything else retrieved it is full attention, and the gate has
    a gradient."""
    attn, full = (
        with_all_retrieved(rotary, TOKENS, 5, 3, 4),
        build("gqa", num_kv_heads=2, rotary=rotary),
    )
    options = {
        "num_kv_heads": 2,
        "local_window": 5,
        "chunk_size": 3,
        "top_k": 14,
        "session_stride": 3,
    }
    gated: Any = build("mka", **options, rotary=rotary)
    gated.load_state_dict(attn.state_dict() | {"session.decay_logit": gated.session.decay_logit})
    gated.router.learn_gate()
    full.load_state_dict(
        {name: value for name, value in attn.state_dict().items() if name in full.state_dict()}
    )
    x = checks.rows(2, TOKENS)
    y = gated(x)[0]
    checks.close(y, full(x)[0])
    y.square().sum().backward()
    assert gated.router.gate.grad != 0


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("kind", SHUT)
def test_without_session_and_long_term_the_local_level_is_all_there_is(
    kind: str, window: int | None
) -> None:
    options = {"num_kv_heads": 2, "local_window": window}
    assert_same(build(kind, **options, session_decay=None, top_k=0), build("gqa", **options))


@pytest.mark.parametrize("kind", ["mha", "mqa", "gqa", "mla", "mka", "fmka"])
def test_a_window_as_long_as_the_row_is_no_window(kind: str) -> None:
    options = checks.options_of(kind, {"num_kv_heads": 2, "top_k": 0})
    windowed, whole = (build(kind, local_window=window, **options) for window in (TOKENS, None))
    assert_same(windowed, whole)
