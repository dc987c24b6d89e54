"""Which mechanism is in which layer of a backbone, according to its configuration."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal

from mka.attention import ATTENTION_TYPES, CausalAttention, build_attention, options_of
from mka.attention.grouped import GroupedAttention
from mka.errors import InputError, nearest, unknown_name
from mka.memory.options import LOCAL_WINDOW
from mka.memory.router import Router
from mka.models.families import (
    family_of,
    head_dim_of,
    kv_heads_of,
    query_factor,
    rotary_of,
    sliding_layers,
)
from mka.record.mechanisms import WITH_MEMORY

MemoryLayers = Literal["all"] | int | Sequence[int]
"""Which layers have a memory: all, every n-th, or those listed, counted from 0."""
FROM_CONFIG = ("hidden_size", "num_heads", "head_dim", "bias", "rotary")
"""Options of a mechanism that the backbone's configuration decides."""
BEFORE = {"mix": "routed", "sink_tokens": 0, "longterm_positions": "clamped", "max_distance": None}
"""Options that every new configuration holds, with the values that models had before
the options existed."""


def defaults_of(attention_type: str, names: Iterable[str]) -> dict[str, Any]:
    """The defaults of the named options, without those that the mechanism does not
    have."""
    options = options_of(attention_type)
    return {name: options[name] for name in names if name in options}


def check_options(attention_type: str, options: dict[str, Any]) -> None:
    """Raises ValueError, naming the nearest name, for an unknown mechanism or option,
    and for an option that the backbone's configuration decides."""
    if attention_type not in ATTENTION_TYPES:
        raise unknown_name("attention type", attention_type, ATTENTION_TYPES)
    allowed = [name for name in options_of(attention_type) if name not in FROM_CONFIG]
    for name in options:
        if name in FROM_CONFIG:
            raise InputError(
                f"{name} is decided by the backbone's configuration; allowed: {', '.join(allowed)}"
            )
        if name not in allowed:
            # memory_layers is no option of a mechanism, but users give it together with
            # those.
            known = [*allowed, *(["memory_layers"] if attention_type in WITH_MEMORY else [])]
            raise InputError(
                f"{attention_type} has no option {name!r}; allowed: {', '.join(known)} (nearest: "
                f"{nearest(name, known)!r})"
            )


def memory_layers_of(config: Any) -> list[int]:
    """The layers of a configuration that have its mechanism, in order.

    Raises ValueError if there is no layer for it, if memory_layers names none, layers
    that do not exist or sliding ones, and if it is not "all" for a mechanism without a
    memory or a window.
    """
    count, chosen = config.num_hidden_layers, config.memory_layers
    sliding = sliding_layers(config)
    open_layers = [number for number in range(count) if number not in sliding]
    if not open_layers:
        raise InputError(
            f"layer_types has {count} sliding layers and no other; no layer is left for the "
            "mechanism"
        )
    if chosen == "all":
        return open_layers
    # Other layers have the window alone, so without a window they would be no cheaper.
    if (
        config.attention_type not in WITH_MEMORY
        or config.attention_options.get("local_window", 0) is None
    ):
        raise InputError(
            f"memory_layers is {chosen!r}; this {config.attention_type} has no memory that other "
            f"layers could do without; allowed: 'all', or {' or '.join(WITH_MEMORY)} with a "
            "local_window"
        )
    # True is an int in Python; as a number of layers it would be a mistake.
    if isinstance(chosen, int) and not isinstance(chosen, bool) and 1 <= chosen <= len(open_layers):
        return open_layers[chosen - 1 :: chosen]
    if (
        isinstance(chosen, list | tuple)
        and chosen
        and all(type(n) is int and n in open_layers for n in chosen)
    ):
        return sorted(set(chosen))
    those = f"layers from 0 to {count - 1}"
    if sliding:
        those = f"layers that are not sliding: {', '.join(map(str, open_layers))}"
    raise InputError(
        f"memory_layers is {chosen!r}; allowed: 'all', every n-th layer by a number from 1 to "
        f"{len(open_layers)}, or a list of {those}"
    )


def make_attention(config: Any, layer: int = 0) -> CausalAttention:
    """The mechanism that a configuration describes for a layer, with torch's initial
    weights.

    A layer without a memory gets windowed attention, with the window and the sinks of
    those that have one. A sliding layer gets the backbone's window and no sinks. Raises
    ValueError for options that the mechanism does not allow, and for a memory_layers
    that does not fit.
    """
    family, options, kind = family_of(config), dict(config.attention_options), config.attention_type
    check_options(kind, options)
    head_dim = head_dim_of(config)
    # What the backbone was trained with there, computed by the plainest mechanism.
    if layer in sliding_layers(config):
        kind, options = (
            "gqa",
            {"num_kv_heads": kv_heads_of(config), "local_window": config.sliding_window},
        )
        options["sink_tokens"] = 0
    # The same window, sinks and key/value heads as the layers with a memory.
    elif layer not in memory_layers_of(config):
        shared = {name: options.get(name) for name in ("sink_tokens", "max_distance")}
        heads = options.get("num_kv_heads") or config.num_attention_heads
        kind, options = (
            "gqa",
            shared
            | {"num_kv_heads": heads, "local_window": options.get("local_window", LOCAL_WINDOW)},
        )
    # mla rotates channels of its own, as many as a head has unless the options say
    # otherwise; the other mechanisms rotate whole heads.
    if family.rotary:
        rope_dim = (
            options.setdefault("qk_rope_head_dim", head_dim)
            if "qk_rope_head_dim" in options_of(kind)
            else head_dim
        )
        options["rotary"] = rotary_of(config, rope_dim, layer) if rope_dim else None
    sizes = {
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "head_dim": head_dim,
    }
    attention = build_attention(kind, **sizes, bias=family.bias(config), **options)
    # A conversion starts with shut gates, since the pretrained model had no memories.
    for module in attention.modules():
        if config.learned_gate and isinstance(module, Router):
            module.learn_gate()
    if isinstance(attention, GroupedAttention):
        attention.query_factor = query_factor(config)
        if family.sink_logits:
            attention.learn_sink_logits()
        if family.head_norm is not None:
            attention.normalize_heads(partial(family.head_norm, eps=config.rms_norm_eps))
    return attention
