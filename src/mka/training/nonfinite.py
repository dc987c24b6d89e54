"""The errors for losses and gradients that are not finite, and where in a model they
begin."""

from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from mka.distributed import Ranks
from mka.models import next_token_loss


class NonFiniteLoss(RuntimeError):
    """The loss was NaN or infinite; it has not reached the weights."""


class NonFiniteGradient(RuntimeError):
    """A gradient was NaN or infinite without loss scaling; it has not reached the
    weights."""


@torch.no_grad()
def first_nonfinite_layer(
    model: nn.Module, tokens: Tensor, autocast: AbstractContextManager
) -> str | None:
    """The name of the first module whose output holds a NaN or an infinity; None: no
    module's.

    tokens: (b, T + 1). Modules count in the order in which they finish.
    """
    found: list[str] = []

    def look_at(name: str):
        """A hook that notes the module's name if its output is not finite."""

        def hook(module: nn.Module, args: object, output: object) -> None:
            """Check each tensor of the output."""
            tensors = output if isinstance(output, (tuple, list)) else [output]
            if any(isinstance(t, Tensor) and not t.isfinite().all() for t in tensors):
                found.append(name)

        return hook

    # The model itself has an empty name; it would be found last, and would say nothing.
    hooks = [
        module.register_forward_hook(look_at(name))
        for name, module in model.named_modules()
        if name
    ]
    # Hooks are removed even if the pass fails, for the model may still be saved or
    # used.
    try:
        with autocast:
            next_token_loss(model, tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def explain(
    model: nn.Module,
    parts: Sequence[Tensor],
    losses: Sequence[Tensor],
    autocast: AbstractContextManager,
    ranks: Ranks,
) -> str:
    """Which layer, on which rank, was the first to be not finite in a step. Collective.

    parts, losses: this rank's parts of the step and their losses.
    """
    # A rank whose losses are all finite still takes part, with any of its parts.
    bad = next(
        (part for part, loss in zip(parts, losses, strict=True) if not loss.isfinite()), parts[0]
    )
    layers = ranks.gather(first_nonfinite_layer(model, bad, autocast))
    for rank, layer in enumerate(layers):
        if layer is not None:
            return f"the first layer whose output is not finite is {layer}" + (
                f" (rank {rank})" * (ranks.count > 1)
            )
    return "all layer outputs are finite; only the loss is not"
