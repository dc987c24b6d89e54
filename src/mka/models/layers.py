"""Which mechanism stands in which layer of a backbone, by its configuration."""

import inspect
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal

from mka.attention import ATTENTION_TYPES, CausalAttention, build_attention
from mka.attention.grouped import GroupedAttention
from mka.limits import LOCAL_WINDOW, InputError, nearest, unknown_name
from mka.memory.router import Router
from mka.models.families import family_of, head_dim_of, kv_heads_of, query_factor, rotary_of, sliding_layers

MemoryLayers = Literal["all"] | int | Sequence[int]
FROM_CONFIG = ("hidden_size", "num_heads", "head_dim", "bias", "rotary")
"""Options of a mechanism that the backbone's configuration decides."""


WITH_MEMORY = ("mka", "fmka")
"""Mechanisms that a model can have in some layers only."""
BEFORE = {"mix": "routed", "sink_tokens": 0, "longterm_positions": "clamped", "max_distance": None}
"""Options that configurations always hold, and what a model had before they existed."""


def defaults_of(attention_type: str, names: Iterable[str]) -> dict[str, Any]:
    """The defaults of those of the options that the mechanism has."""
    parameters = inspect.signature(ATTENTION_TYPES[attention_type]).parameters
    return {name: parameters[name].default for name in names if name in parameters}


def check_options(attention_type: str, options: dict[str, Any]) -> None:
    """Raises ValueError for an unknown mechanism or option, with the nearest name."""
    if attention_type not in ATTENTION_TYPES:
        raise unknown_name("attention type", attention_type, ATTENTION_TYPES)
    allowed = [
        name for name in inspect.signature(ATTENTION_TYPES[attention_type]).parameters if name not in FROM_CONFIG
    ]
    for name in options:
        if name in FROM_CONFIG:
            raise InputError(f"{name} is decided by the backbone's configuration; allowed: {', '.join(allowed)}")
        if name not in allowed:
            known = [*allowed, *(["memory_layers"] if attention_type in WITH_MEMORY else [])]
            raise InputError(
                f"{attention_type} has no option {name!r}; allowed: {', '.join(known)} (nearest: "
                f"{nearest(name, known)!r})"
            )


def memory_layers_of(config: Any) -> list[int]:
    """The layers of a configuration that have its mechanism, first one first. Raises ValueError for a choice of none,
    of layers that there are not or that the backbone windows itself, and for mechanisms without a memory or a window.
    """
    count, chosen = config.num_hidden_layers, config.memory_layers
    sliding = sliding_layers(config)
    open_layers = [number for number in range(count) if number not in sliding]
    if not open_layers:
        raise InputError(f"layer_types has {count} sliding layers and no other; a mechanism has no place to stand")
    if chosen == "all":
        return open_layers
    if config.attention_type not in WITH_MEMORY or config.attention_options.get("local_window", 0) is None:
        raise InputError(
            f"memory_layers is {chosen!r}; {config.attention_type} as it is here has no memory that other layers could "
            f"be without; allowed: 'all', or {' or '.join(WITH_MEMORY)} with a local_window"
        )
    if isinstance(chosen, int) and not isinstance(chosen, bool) and 1 <= chosen <= len(open_layers):
        return open_layers[chosen - 1 :: chosen]
    if isinstance(chosen, list | tuple) and chosen and all(type(n) is int and n in open_layers for n in chosen):
        return sorted(set(chosen))
    those = f"layers from 0 to {count - 1}"
    if sliding:
        those = f"layers that are not sliding: {', '.join(map(str, open_layers))}"
    raise InputError(
        f"memory_layers is {chosen!r}; allowed: 'all', every n-th layer by a number from 1 to {len(open_layers)}, or a "
        f"list of {those}"
    )


def make_attention(config: Any, layer: int = 0) -> CausalAttention:
    """The mechanism that a configuration describes for a layer; its weights are as torch makes them.

    A layer that is to have no memory has windowed attention, with the window and the sinks of those that have one; a
    sliding layer of the backbone has the backbone's window, and no sinks.
    """
    family, options, kind = family_of(config), dict(config.attention_options), config.attention_type
    check_options(kind, options)
    head_dim = head_dim_of(config)
    if layer in sliding_layers(config):
        kind, options = "gqa", {"num_kv_heads": kv_heads_of(config), "local_window": config.sliding_window}
        options["sink_tokens"] = 0
    elif layer not in memory_layers_of(config):
        shared = {name: options.get(name) for name in ("sink_tokens", "max_distance")}
        heads = options.get("num_kv_heads") or config.num_attention_heads
        kind, options = (
            "gqa",
            shared | {"num_kv_heads": heads, "local_window": options.get("local_window", LOCAL_WINDOW)},
        )
    if family.rotary:
        rope_dim = options.setdefault("qk_rope_head_dim", head_dim) if kind == "mla" else head_dim
        options["rotary"] = rotary_of(config, rope_dim, layer) if rope_dim else None
    sizes = {"hidden_size": config.hidden_size, "num_heads": config.num_attention_heads, "head_dim": head_dim}
    attention = build_attention(kind, **sizes, bias=family.bias(config), **options)
    for module in attention.modules():
        if config.learned_gate and isinstance(module, Router):
            module.learn_gate()
    if isinstance(attention, GroupedAttention):
        attention.query_factor = query_factor(config)
        if family.sink_logits:
            attention.learn_sink_logits()
        if family.head_norm is not None:
            attention.normalise_heads(partial(family.head_norm, eps=config.rms_norm_eps))
    return attention
