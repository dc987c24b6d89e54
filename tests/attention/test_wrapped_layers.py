"""What wraps a layer, hooks it or keeps its weights in another form is honoured: layers are called,
not read."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune

import checks
import checks_state
import checks_wrapped
from mka.attention import ATTENTION_TYPES, build_attention
from mka.memory.local import shown_weights

every_kind = pytest.mark.parametrize("kind", ATTENTION_TYPES)
VARIANTS = ("small", "biased", "rotary")
LAYERS = [
    (kind, variant, name)
    for kind in ATTENTION_TYPES
    for variant in VARIANTS
    for name in checks_wrapped.linear_layers(checks.make(kind, variant))
]
UP = ("k_up_proj", "v_up_proj")


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


def twice(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    return 2 * output


def twice_before(module: nn.Module, inputs: Any) -> Any:
    return (2 * inputs[0],) if type(module) is nn.Linear else None


@pytest.mark.parametrize(("kind", "variant", "name"), LAYERS)
def test_every_layer_is_called(kind: str, variant: str, name: str) -> None:
    checks_wrapped.assert_layer_is_called(
        checks.make(kind, variant), name, checks.make(kind, variant)
    )


@pytest.mark.parametrize("how", ["hook", "pre-hook", "parametrized", "pruned", "forward replaced"])
@pytest.mark.parametrize("name", UP)
@torch.no_grad()
def test_what_changes_a_layer_of_mla_is_kept_in_decoding(how: str, name: str) -> None:
    attn, x = checks.make("mla", "rotary"), checks.rows(2, 20)
    plain, layer = attn(x)[0], attn.get_submodule(name)
    if how == "hook":
        layer.register_forward_hook(twice)
    elif how == "pre-hook":
        layer.register_forward_pre_hook(lambda module, inputs: (2 * inputs[0],))
    elif how == "parametrized":
        parametrize.register_parametrization(layer, "weight", Doubled())
    elif how == "pruned":
        prune.l1_unstructured(layer, "weight", 0.5)
    else:
        real: Any = layer.forward
        layer.forward = lambda x: real(x) * 2
    whole = attn(x)[0]
    assert not torch.allclose(whole, plain)
    checks.close(checks_state.in_calls(attn, x, (7, 8, 15))[0], whole)


@pytest.mark.parametrize("how", ["hook of all modules", "pre-hook of all modules", "the class"])
@torch.no_grad()
def test_what_changes_every_layer_is_kept_in_decoding(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attn, x = checks.make("mla", "rotary"), checks.rows(2, 20)
    plain, real, handle = attn(x)[0], nn.Linear.forward, None
    if how == "the class":
        monkeypatch.setattr(nn.Linear, "forward", lambda layer, x: 2 * real(layer, x))
    elif how == "hook of all modules":
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output: (
                twice(module, inputs, output) if type(module) is nn.Linear else None
            )
        )
    else:
        handle = nn.modules.module.register_module_forward_pre_hook(twice_before)
    try:
        whole = attn(x)[0]
        assert not torch.allclose(whole, plain)
        checks.close(checks_state.in_calls(attn, x, (7, 8, 15))[0], whole)
    finally:
        if handle is not None:
            handle.remove()


@torch.no_grad()
def test_weights_that_are_shown_follow_the_wrapped_layer() -> None:
    attn, x = checks.make("mla", "rotary"), checks.rows(1, 12)
    checks_wrapped.replace(attn, "k_up_proj", checks_wrapped.Wrapped)
    with shown_weights() as whole:
        attn(x)
    state = attn.initial_state(1)
    with shown_weights() as parts:
        for part in (x[:, :5], x[:, 5:]):
            _, state = attn(part, state=state)
    checks.close(parts[1], whole[0][:, :, 5:])


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_a_state_is_of_the_dtype_of_the_activations(kind: str, dtype: torch.dtype) -> None:
    """Weights in eight bits: a state made after them would round every key to a whole number."""
    attn = checks.make(kind, dtype=dtype)
    checks_wrapped.quantize(attn)
    x = checks.rows(2, 25, dtype)
    state = attn.initial_state(2, dtype=dtype)
    checks.close_rms(checks_state.in_calls(attn, x, (9, 10), state=state)[0], attn(x)[0])


@every_kind
def test_a_layer_without_real_weights_still_makes_a_state(kind: str) -> None:
    attn = checks.make(kind, dtype=torch.float32)
    checks_wrapped.quantize(attn)
    state = attn.initial_state(1)
    assert {tensor.dtype for tensor in state.tensors.values()} == {torch.float32}
    assert attn.state_nbytes(1, 9) == attn.state_nbytes(1, 9, torch.float32)


def test_the_router_computes_in_float32_whatever_its_weights_are_kept_in() -> None:
    attn = build_attention("mka", hidden_size=16, num_heads=2).bfloat16()
    router: Any = attn.get_submodule("router")
    q = torch.randn(1, 3, 2, 8, dtype=torch.bfloat16)
    assert router.biases(q).dtype == torch.float32
    assert router.hidden(q.flatten(2)).dtype == torch.float32
