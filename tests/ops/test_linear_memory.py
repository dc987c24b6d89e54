"""No T x T tensor is stored: the largest tensor of forward and backward, and the largest saved one,
are linear in T."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from checks import options_of
from mka.attention import build_attention
from mka.ops.attend import attend_masked

LINEAR_KINDS = ["mha", "mqa", "gqa", "mla", "mka", "fmka"]


class LargestOutput(TorchDispatchMode):
    """Remembers the elements of the largest tensor that any operator gave."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self.numel = max(
                    self.numel, min(leaf.numel(), leaf.untyped_storage().nbytes() // leaf.itemsize)
                )
        return out


def largest(run: Any) -> tuple[int, int]:
    """Elements of the largest tensor computed and of the largest saved for the backward pass of
    run()."""
    saved = [0]

    def pack(x: Tensor) -> Tensor:
        saved.append(x.untyped_storage().nbytes() // x.itemsize)
        return x

    with LargestOutput() as outputs, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run().sum().backward()
    return outputs.numel, max(saved)


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_the_largest_tensor_doubles_when_the_row_doubles(kind: str, window: int | None) -> None:
    options = options_of(kind, {"local_window": window, "num_kv_heads": 2, "index_size": 8})
    if kind == "mha":
        options.pop("num_kv_heads", None)
    torch.manual_seed(0)
    attn = build_attention(kind, hidden_size=32, num_heads=4, **options)
    sizes = [
        largest(lambda t=tokens: attn(torch.randn(1, t, 32))[0]) for tokens in (1024, 2048, 4096)
    ]
    for short, middle, long in zip(*sizes, strict=True):
        # The growth doubles, where that of a quadratic tensor would be fourfold; blocks of a window
        # are one fewer.
        assert long - middle <= 2 * (middle - short)
        # No quadratic tensor hides under a larger linear one.
        assert long < 4096 * 4096 // 8


def test_the_meter_sees_a_quadratic_tensor() -> None:
    def dense(tokens: int) -> Tensor:
        q, k, v = torch.randn(3, 1, tokens, 2, 4, requires_grad=True)
        return attend_masked(q, k, v, torch.ones(tokens, tokens, dtype=torch.bool).tril()).values

    short, long = (largest(lambda t=tokens: dense(t))[0] for tokens in (512, 1024))
    assert long >= 4 * short
