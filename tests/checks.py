"""The guarantees as functions: the contract runs them on every mechanism, the negative tests on
planted defects."""

import inspect
from typing import Any

import torch
from torch import Tensor

from mka.attention import ATTENTION_TYPES, CausalAttention, build_attention
from mka.attention.naive import naive
from mka.ops.rotary import RotaryEmbedding

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
RELATIVE_RMS = {torch.bfloat16: 2e-2}

HIDDEN_SIZE, NUM_HEADS = 16, 4
SMALL = {
    "num_kv_heads": 2,
    "local_window": 5,
    "chunk_size": 3,
    "top_k": 2,
    "session_stride": 4,
    "session_slots": 3,
    "index_size": 3,
}
ROTARY = RotaryEmbedding(HIDDEN_SIZE // NUM_HEADS)
VARIANTS: dict[str, dict[str, Any]] = {
    "small": SMALL,
    "no-window": SMALL | {"local_window": None, "session_stride": 1, "session_slots": 7},
    "literal": {
        "mix": "routed",
        "local_window": None,
        "session_decay": 0.9,
        "session_stride": 1,
        "session_slots": None,
        "top_k": 0,
    },
    "no-sinks": SMALL | {"sink_tokens": 0},
    "biased": SMALL | {"bias": True, "q_lora_rank": 6, "kv_lora_rank": 3},
    "wide": SMALL | {"head_dim": 6, "bias": "qkv"},
    "rotary": SMALL | {"rotary": ROTARY, "qk_rope_head_dim": ROTARY.head_dim},
    "far": SMALL
    | {"rotary": ROTARY, "qk_rope_head_dim": ROTARY.head_dim, "sink_tokens": 2, "max_distance": 10},
    "routed": SMALL
    | {"mix": "routed", "longterm_positions": "clamped", "sink_tokens": 1, "rotary": ROTARY},
    "routed far": SMALL | {"mix": "routed", "rotary": ROTARY, "max_distance": 12},
    "clamped": SMALL | {"rotary": ROTARY, "longterm_positions": "clamped"},
    "one chunk": SMALL | {"top_k": 1, "rotary": ROTARY, "sink_tokens": 2},
    "unplaced": SMALL | {"rotary": ROTARY, "longterm_positions": "none", "sink_tokens": 0},
}
OF_MKA = ("routed", "routed far", "clamped", "unplaced", "one chunk")
"""Variants of what mka alone has; with one chunk there are many that the means do not propose."""
CASES = [
    (kind, variant)
    for kind in ATTENTION_TYPES
    for variant in VARIANTS
    if variant not in OF_MKA or kind == "mka"
]


def options_of(kind: str, wanted: dict[str, Any]) -> dict[str, Any]:
    """Those of the wanted options that the mechanism has."""
    return {
        name: value
        for name, value in wanted.items()
        if name in inspect.signature(ATTENTION_TYPES[kind]).parameters
    }


def make(
    kind: str, variant: str = "small", dtype: torch.dtype = torch.float64, **changes: Any
) -> CausalAttention:
    """A small mechanism whose every parameter is random, routers and norms included."""
    sizes = {"hidden_size": HIDDEN_SIZE, "num_heads": NUM_HEADS}
    attn = build_attention(kind, **sizes, **options_of(kind, VARIANTS[variant] | changes)).to(dtype)
    torch.manual_seed(1)
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return attn


def rows(batch: int, tokens: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, HIDDEN_SIZE, generator=generator, dtype=torch.float64).to(
        dtype
    )


def close(a: Tensor, b: Tensor) -> None:
    """Equal within the one table of tolerances, in units of the larger of 1 and the largest
    value."""
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    error = (a - b).abs().max() / b.abs().max().clamp(min=1)
    assert error <= TOLERANCE[a.dtype], f"off by {error:.1e}"


def close_rms(a: Tensor, b: Tensor) -> None:
    """Equal within the one table of tolerances, bfloat16 by the root of the mean square."""
    if a.dtype != torch.bfloat16:
        return close(a, b)
    error = (a - b).double().square().mean().sqrt() / b.double().square().mean().sqrt()
    assert error <= RELATIVE_RMS[a.dtype], f"off by {error:.1e}"


def assert_no_gradient_from_future(attn: CausalAttention, x: Tensor) -> None:
    x = x.clone().requires_grad_()
    y, _ = attn(x)
    for t in range(x.shape[1]):
        (grad,) = torch.autograd.grad(y[:, t].sum(), x, retain_graph=True)
        assert (grad[:, t + 1 :] == 0).all(), f"output {t} depends on a later token"
        assert (grad[:, t] != 0).any(), f"output {t} does not depend on its own token"


def assert_future_values_ignored(attn: CausalAttention, x: Tensor, huge: float = 1e30) -> None:
    y, _ = attn(x)
    for t in range(0, x.shape[1] - 1, 3):
        changed = x.clone()
        changed[:, t + 1 :] *= huge
        close(attn(changed)[0][:, : t + 1], y[:, : t + 1])


def assert_largest_values_ignored(attn: CausalAttention, x: Tensor) -> None:
    """The largest numbers there are, of one sign and of both: every product with them leaves the
    range of the dtype."""
    largest, mixed = (
        torch.finfo(x.dtype).max,
        torch.where(rows(x.shape[0], x.shape[1], seed=9) < 0, -1.0, 1.0).to(x),
    )
    for made in (lambda: None, lambda: attn.initial_state(x.shape[0])):
        y, _ = attn(x, state=made())
        for number, t in enumerate(range(0, x.shape[1] - 1, 5)):
            changed = x.clone()
            changed[:, t + 1 :] = largest * (mixed[:, t + 1 :] if number % 2 else 1)
            assert torch.equal(attn(changed, state=made())[0][:, : t + 1], y[:, : t + 1])


def assert_padding_ignored(attn: CausalAttention, x: Tensor, valid: Tensor) -> None:
    """Each row gives what its valid tokens give alone, whatever stands at the padding; zeros at the
    padding."""
    garbage = torch.where(valid[..., None], x, torch.full_like(x, 1e6))
    y, _ = attn(garbage, valid=valid)
    for row, kept in enumerate(valid):
        assert (y[row, ~kept] == 0).all()
        if kept.any():
            close(y[row, kept], attn(x[row : row + 1, kept])[0][0])


def assert_batch_mates_ignored(attn: CausalAttention, x: Tensor) -> None:
    y, _ = attn(x)
    for row in range(x.shape[0]):
        close(y[row : row + 1], attn(x[row : row + 1])[0])


def assert_equals_naive(
    attn: CausalAttention, x: Tensor, valid: Tensor | None = None, **inputs: Tensor
) -> None:
    """Outputs, and the gradients of inputs and of every parameter."""
    x = x.clone().requires_grad_()
    fast, slow = attn(x, valid=valid, **inputs)[0], naive(attn, x, valid=valid, **inputs)
    close(fast, slow)
    direction = torch.randn(
        fast.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    ).to(x.dtype)
    wanted = [x, *attn.parameters()]
    grads = [
        torch.autograd.grad(y, wanted, direction, allow_unused=True, materialize_grads=True)
        for y in (fast, slow)
    ]
    for a, b in zip(*grads, strict=True):
        close(a, b)
