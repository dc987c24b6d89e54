"""Attention mechanisms behind one contract: `CausalAttention` (docs/attention.md)."""

import inspect
from importlib import import_module
from typing import Any

from mka.attention.base import CausalAttention
from mka.attention.fmka import FastMemoryKeyedAttention
from mka.attention.gqa import GroupedQueryAttention, MultiHeadAttention, MultiQueryAttention
from mka.attention.mka import MemoryKeyedAttention
from mka.attention.mla import MultiHeadLatentAttention
from mka.errors import unknown_name
from mka.record.mechanisms import MECHANISMS


def class_at(path: str) -> type[CausalAttention]:
    """The class at "module:Class". Raises TypeError if it is not a
    `CausalAttention`."""
    module, _, name = path.partition(":")
    found = getattr(import_module(module), name)
    if not issubclass(found, CausalAttention):
        raise TypeError(f"{path} is not a CausalAttention")
    return found


# The table names the classes as text, because it is also read where torch must not be
# imported.
ATTENTION_TYPES: dict[str, type[CausalAttention]] = {
    name: class_at(row.class_path) for name, row in MECHANISMS.items()
}
"""The class of each mechanism, by name; `mka.record.mechanisms` is their table."""


def options_of(kind: str) -> dict[str, Any]:
    """The options of a mechanism with their defaults.

    An option without a default has `inspect.Parameter.empty`. Raises KeyError for an
    unknown name.
    """
    parameters = inspect.signature(ATTENTION_TYPES[kind]).parameters.values()
    return {parameter.name: parameter.default for parameter in parameters}


def build_attention(kind: str, **options: Any) -> CausalAttention:
    """Build the mechanism called `kind` ("mha", "mka", ...).

    Args:
        kind: a name in ATTENTION_TYPES.
        options: the arguments of its class.

    Raises ValueError for an unknown name, and whatever the class raises for its
    options.
    """
    if kind not in ATTENTION_TYPES:
        raise unknown_name("attention type", kind, ATTENTION_TYPES)
    return ATTENTION_TYPES[kind](**options)


__all__ = [
    "ATTENTION_TYPES",
    "CausalAttention",
    "FastMemoryKeyedAttention",
    "GroupedQueryAttention",
    "MemoryKeyedAttention",
    "MultiHeadAttention",
    "MultiHeadLatentAttention",
    "MultiQueryAttention",
    "build_attention",
    "options_of",
]
