"""Where a forward pass stops being finite."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from mka.distributed import Ranks
from mka.models import next_token_loss


class NonFiniteLoss(RuntimeError):
    """The loss was NaN or infinite; the optimiser has not stepped on it."""


class NonFiniteGradient(RuntimeError):
    """A gradient was NaN or infinite where nothing scales the loss; the optimiser has not stepped on it."""


@torch.no_grad()
def first_nonfinite_layer(model: nn.Module, tokens: Tensor, autocast: AbstractContextManager) -> str | None:
    """The name of the first module, in the order they finish, whose output holds a NaN or an infinity."""
    found: list[str] = []

    def look_at(name: str):
        def hook(module: nn.Module, args: object, output: object) -> None:
            tensors = output if isinstance(output, (tuple, list)) else [output]
            if any(isinstance(t, Tensor) and not t.isfinite().all() for t in tensors):
                found.append(name)

        return hook

    hooks = [module.register_forward_hook(look_at(name)) for name, module in model.named_modules() if name]
    try:
        with autocast:
            next_token_loss(model, tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def explain(
    model: nn.Module, parts: Sequence[Tensor], losses: Sequence[Tensor], autocast: AbstractContextManager, ranks: Ranks
) -> str:
    """Which layer of which rank was the first, among the parts of a step whose loss is not finite. Collective."""
    bad = next((part for part, loss in zip(parts, losses, strict=True) if not loss.isfinite()), parts[0])
    layers = ranks.gather(first_nonfinite_layer(model, bad, autocast))
    for rank, layer in enumerate(layers):
        if layer is not None:
            return f"the first layer whose output is not finite is {layer}" + (f" (rank {rank})" * (ranks.count > 1))
    return "every layer's output is finite, only the loss itself is not"
