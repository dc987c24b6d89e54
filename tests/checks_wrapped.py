"""Layers that stand where a plain one stood: what is computed has to come from calling them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import checks
import checks_state
from mka.attention import CausalAttention
from mka.memory.router import WideLinear

TOKENS = 29


class Wrapped(nn.Module):
    """The layer it holds, its outputs scaled unevenly; it has no weight of its own that could be
    read."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.inside = layer

    def forward(self, x: Tensor) -> Tensor:
        y = self.inside(x)
        return y * uneven(y.shape[-1])


def uneven(outputs: int) -> Tensor:
    """1, 2, 3, 1, 2, ..., so that no norm behind a layer takes it away."""
    return 1 + torch.arange(outputs) % 3


class Int8Linear(nn.Module):
    """Weights as whole numbers from -127 to 127, and what a step of each row is worth."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        step = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter(
            (layer.weight.detach() / step).round().to(torch.int8), requires_grad=False
        )
        self.step = step.float()
        self.bias = None if layer.bias is None else layer.bias.detach().float()

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.step.to(x.dtype), bias)


def linear_layers(attn: nn.Module) -> list[str]:
    return [name for name, module in attn.named_modules() if isinstance(module, nn.Linear)]


def replace(attn: nn.Module, name: str, make: Callable[[Any], nn.Module]) -> None:
    attn.set_submodule(name, make(attn.get_submodule(name)))


@torch.no_grad()
def assert_layer_is_called(attn: CausalAttention, name: str, plain: CausalAttention) -> None:
    """`attn` with the layer wrapped equals `plain`, the same with the wrapper's scale in its
    weights, in every way of reading a row."""
    layer = plain.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    for parameter in layer.parameters():
        parameter.mul_(uneven(len(parameter)).view(-1, *[1] * (parameter.dim() - 1)))
    x = checks.rows(2, TOKENS)
    before, wanted = attn(x)[0], plain(x)[0]
    assert not torch.allclose(before, wanted, rtol=1e-6), f"{name} does not matter here"
    replace(attn, name, Wrapped)
    checks.close(attn(x)[0], wanted)
    for cuts in ((), (11,), range(1, TOKENS)):
        checks.close(checks_state.in_calls(attn, x, cuts)[0], wanted)


def quantize(attn: CausalAttention) -> None:
    """Every layer but the router's, as libraries do it that look for nn.Linear itself."""
    for name in linear_layers(attn):
        if not isinstance(attn.get_submodule(name), WideLinear):
            replace(attn, name, Int8Linear)
