"""The backbones that can carry our mechanisms, and where each of them differs."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from mka.attention.base import Bias
from mka.limits import InputError
from mka.ops.rotary import RotaryEmbedding


@dataclass(frozen=True)
class Family:
    """A family of transformers' models, as Llama is where nothing else is said.

    blocks: the list of decoder blocks of a causal model; attention_name: the attribute of a block that is replaced;
    bias: which projections have one, from the configuration; rotary: whether positions are rotary; head_norm: what
    normalises queries and keys head by head, made of the size of a head and `eps`; sink_logits: whether heads have a
    learned logit for attending to nothing; windowed: which layers have the window config.sliding_window, by what
    transformers' model does, whatever else its configuration may hold: none, all, or as config.layer_types says.
    """

    blocks: Callable[[Any], nn.ModuleList] = lambda model: model.model.layers
    attention_name: str = "self_attn"
    bias: Callable[[Any], Bias] = lambda config: bool(config.attention_bias)
    rotary: bool = True
    head_norm: Callable[..., nn.Module] | None = None
    sink_logits: bool = False
    windowed: Literal["none", "all", "by layer"] = "none"


FAMILIES = {
    "gpt2": Family(lambda model: model.transformer.h, "attn", lambda config: True, rotary=False),
    "llama": Family(),
    "mistral": Family(bias=lambda config: False, windowed="all"),
    "qwen2": Family(bias=lambda config: "qkv", windowed="by layer"),
    "qwen3": Family(head_norm=lambda size, eps: nn.RMSNorm(size, eps=eps), windowed="by layer"),
    "gemma3_text": Family(head_norm=Gemma3RMSNorm, windowed="by layer"),
    "gpt_oss": Family(sink_logits=True, windowed="by layer"),
}
"""By transformers' model_type. SmolLM and SmolLM2 are of the type llama."""
PREFIX = "mka_"
FULL, SLIDING = "full_attention", "sliding_attention"
"""transformers' words for the kinds of layers."""


def family_of(config: PreTrainedConfig) -> Family:
    """Raises ValueError for a family that is not supported, and for an option of it that a mechanism cannot honour."""
    family = FAMILIES.get(config.model_type.removeprefix(PREFIX))
    if family is None:
        raise InputError(
            f"model_type is {config.model_type!r}; allowed: {', '.join(FAMILIES)} (SmolLM is of the type llama)"
        )
    refused = {
        "scale_attn_weights": (True, None),
        "scale_attn_by_inverse_layer_idx": (False, None),
        "add_cross_attention": (False, None),
        "attn_logit_softcapping": (None,),
        "use_bidirectional_attention": (False, None),
    }
    for name, allowed in refused.items():
        if (value := getattr(config, name, None)) not in allowed:
            raise InputError(f"{name} is {value}; the mechanisms need {allowed[0]}")
    others = set(layer_types(config, family)) - {FULL, SLIDING}
    if others:
        raise InputError(f"layer_types has {min(others)!r}; allowed: {FULL!r}, {SLIDING!r}")
    return family


def layer_types(config: Any, family: Family) -> Sequence[str]:
    """What each layer is, where the family has layers of several kinds."""
    return config.layer_types if family.windowed == "by layer" else ()


def head_dim_of(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_heads_of(config: Any) -> int:
    """Key/value heads of the backbone's own attention."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def query_factor(config: Any) -> float:
    """By what queries are multiplied beside 1 / sqrt(D), where a family has a scale of its own."""
    scalar = getattr(config, "query_pre_attn_scalar", None)
    return 1.0 if scalar is None else math.sqrt(head_dim_of(config) / scalar)


def rotates_by_layer(config: Any) -> bool:
    """Whether the sliding layers of a family have rotary embeddings of their own."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return bool(parameters) and all(isinstance(value, dict) for value in parameters.values())


def sliding_layers(config: Any) -> frozenset[int]:
    """The layers that the backbone windows by itself, where not all are alike."""
    kinds = layer_types(config, family_of(config))
    found = frozenset(number for number, kind in enumerate(kinds) if kind == SLIDING)
    return found if rotates_by_layer(config) or len(found) < len(kinds) else frozenset()


def rotary_of(config: Any, head_dim: int, layer: int = 0) -> RotaryEmbedding:
    """The rotary embedding a configuration describes for a layer, with exactly transformers' frequencies.

    Raises ValueError for one that changes with the length of the row, or that rotates a part of each head.
    """
    parameters, of_layer = config.rope_parameters, {}
    if rotates_by_layer(config):
        of_layer = {"layer_type": config.layer_types[layer]}
        parameters = parameters[config.layer_types[layer]]
    kind = parameters["rope_type"]
    base = parameters["rope_theta"]
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(f"partial_rotary_factor is {parameters['partial_rotary_factor']}; the mechanisms need 1.0")
    if kind == "default":
        return RotaryEmbedding(head_dim, base)
    if kind in ("dynamic", "longrope"):
        raise InputError(
            f"rope_type is {kind!r}, which changes with the length of the row; allowed: default, linear, llama3, yarn"
        )
    if head_dim != head_dim_of(config):
        raise InputError(f"rope_type is {kind!r}; with qk_rope_head_dim={head_dim} allowed: default")
    with torch.device("cpu"):  # from_pretrained builds models without data
        frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), **of_layer)
    return RotaryEmbedding(head_dim, base, tuple(frequencies.tolist()), scaling)


def window_of(config: Any) -> int | None:
    """The sliding window of the backbone's own attention, but for that of `sliding_layers`."""
    family = family_of(config)
    is_windowed = family.windowed == "all" or SLIDING in layer_types(config, family)
    return config.sliding_window if is_windowed and not sliding_layers(config) else None
