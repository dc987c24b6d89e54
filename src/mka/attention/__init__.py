"""Attention mechanisms under one contract."""

from typing import Any

from mka.attention.base import CausalAttention
from mka.attention.fmka import FastMemoryKeyedAttention
from mka.attention.gqa import GroupedQueryAttention, MultiHeadAttention, MultiQueryAttention
from mka.attention.mka import MemoryKeyedAttention
from mka.attention.mla import MultiHeadLatentAttention
from mka.limits import unknown_name

ATTENTION_TYPES: dict[str, type[CausalAttention]] = {
    "mha": MultiHeadAttention,
    "mqa": MultiQueryAttention,
    "gqa": GroupedQueryAttention,
    "mla": MultiHeadLatentAttention,
    "mka": MemoryKeyedAttention,
    "fmka": FastMemoryKeyedAttention,
}


def build_attention(kind: str, **options: Any) -> CausalAttention:
    """The mechanism of that name; options are those of its class. Raises ValueError for an unknown name."""
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
]
