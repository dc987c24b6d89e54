"""Later versions of transformers, as their blocks would call our attention; and caches that are no
good."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import Cache

from mka.models import AttentionAdapter, StateLayer

Change = Callable[[dict[str, Any]], dict[str, Any]]


def hand_on(patch: pytest.MonkeyPatch, change: Change, blocks: tuple[int, ...] = (0, 1)) -> None:
    """The blocks give their attention other arguments than transformers does."""
    real = AttentionAdapter.forward

    def forward(adapter: AttentionAdapter, hidden_states: torch.Tensor, **given: Any) -> Any:
        return real(
            adapter, hidden_states, **(change(given) if adapter.layer_idx in blocks else given)
        )

    patch.setattr(AttentionAdapter, "forward", forward)


def under(name: str) -> Change:
    return lambda given: {
        name if isinstance(value, Cache) else key: value for key, value in given.items()
    }


def without(given: dict[str, Any]) -> dict[str, Any]:
    """Neither the cache nor that one is wanted."""
    return {
        key: value
        for key, value in given.items()
        if not isinstance(value, Cache) and key != "use_cache"
    }


def without_mask(given: dict[str, Any]) -> dict[str, Any]:
    """It has another name, too, and padding is read."""
    return {key: value for key, value in given.items() if key != "attention_mask"}


def stale(layer: StateLayer, *given: Any, real: Any = StateLayer.attend) -> torch.Tensor:
    """It counts what it has seen, and holds nothing of it."""
    for held in layer.state.tensors.values() if layer.state else ():
        held.zero_()
    return real(layer, *given)
