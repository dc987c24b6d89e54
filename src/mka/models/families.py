"""The backbones that our mechanisms can be put into, and how they differ from each
other."""

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
from mka.errors import InputError
from mka.ops.rotary import RotaryEmbedding


@dataclass(frozen=True)
class Family:
    """A family of transformers' models; the defaults are those of Llama.

    Args:
        blocks: the list of decoder layers of a causal model.
        attention_name: the attribute of a decoder layer that is replaced.
        bias: which projections have a bias, given the configuration.
        rotary: whether positions are rotary.
        head_norm: makes what normalizes each query and key head, given D and `eps`.
            None: nothing.
        sink_logits: whether heads have a learned logit for attending to nothing.
        windowed: which layers have the window config.sliding_window in transformers'
            model: none, all, or those that config.layer_types names. A configuration
            may hold a window that the model ignores.
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
"""The families by transformers' model_type. SmolLM and SmolLM2 are of type llama."""
PREFIX = "mka_"
"""What precedes the model_type of a family in that of ours."""
FULL, SLIDING = "full_attention", "sliding_attention"
"""transformers' names for the kinds of layers in layer_types."""


def position_limit(model: Any) -> int | None:
    """The positions that a model of any kind has learned; None if they are rotary, or
    not known."""
    config = model.config
    family = FAMILIES.get(str(getattr(config, "model_type", "")).removeprefix(PREFIX))
    return None if family is None or family.rotary else config.max_position_embeddings


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a configuration, converted or not.

    Raises ValueError for a family that is not supported, and for an option that no
    mechanism can compute.
    """
    family = FAMILIES.get(config.model_type.removeprefix(PREFIX))
    if family is None:
        raise InputError(
            f"model_type is {config.model_type!r}; allowed: {', '.join(FAMILIES)} (SmolLM is "
            "of the type llama)"
        )
    # For each option the values that change nothing; the first is named to the user.
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
    """The kind of each layer (FULL or SLIDING); empty if the family has layers of one
    kind."""
    return config.layer_types if family.windowed == "by layer" else ()


def head_dim_of(config: Any) -> int:
    """D, the number of channels per head."""
    # Some families have heads whose width is not C / H.
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_heads_of(config: Any) -> int:
    """G, the number of key/value heads of the backbone's own attention."""
    # GPT-2 has no such field: each query head has its own key/value head.
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def query_factor(config: Any) -> float:
    """The factor of queries, in addition to 1 / sqrt(D), of a family with a scale of
    its own; 1 for the others."""
    scalar = getattr(config, "query_pre_attn_scalar", None)
    return 1.0 if scalar is None else math.sqrt(head_dim_of(config) / scalar)


def rotates_by_layer(config: Any) -> bool:
    """Whether the kinds of layers have different rotary embeddings (as in Gemma 3)."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return bool(parameters) and all(isinstance(value, dict) for value in parameters.values())


def sliding_layers(config: Any) -> frozenset[int]:
    """The sliding layers that stay as they are, because the backbone has full layers
    too.

    Empty if all layers are sliding with one rotary embedding: the mechanism then takes
    over their window.
    """
    kinds = layer_types(config, family_of(config))
    # If all layers slide, there is no full one to tell them from, unless they rotate
    # differently.
    found = frozenset(number for number, kind in enumerate(kinds) if kind == SLIDING)
    return found if rotates_by_layer(config) or len(found) < len(kinds) else frozenset()


def rotary_of(config: Any, head_dim: int, layer: int = 0) -> RotaryEmbedding:
    """The rotary embedding of a layer, with exactly transformers' frequencies.

    Args:
        config: of a family with rotary positions.
        head_dim: channels that are rotated: D, or D_rope of mla.
        layer: number of the layer, for families whose kinds of layers differ. Default:
            0.

    Raises ValueError for a rotary embedding that changes with the length of the row,
    that rotates a part of each head, or that is scaled and asked for in another size
    than D.
    """
    # Families whose kinds of layers differ have one set of parameters per kind.
    parameters, of_layer = config.rope_parameters, {}
    if rotates_by_layer(config):
        of_layer = {"layer_type": config.layer_types[layer]}
        parameters = parameters[config.layer_types[layer]]
    kind = parameters["rope_type"]
    base = parameters["rope_theta"]
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise InputError(
            f"partial_rotary_factor is {parameters['partial_rotary_factor']}; the mechanisms "
            "need 1.0"
        )
    if kind == "default":
        return RotaryEmbedding(head_dim, base)
    # A cached key would have to be rotated again whenever the row gets longer.
    if kind in ("dynamic", "longrope"):
        raise InputError(
            f"rope_type is {kind!r}, which changes with the length of the row; allowed: "
            "default, linear, llama3, yarn"
        )
    # transformers computes scaled frequencies for the size of a head, and for no other.
    if head_dim != head_dim_of(config):
        raise InputError(
            f"rope_type is {kind!r}; with qk_rope_head_dim={head_dim} allowed: default"
        )
    # On the CPU even where from_pretrained builds the model without data: these are
    # constants.
    with torch.device("cpu"):
        frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), **of_layer)
    return RotaryEmbedding(head_dim, base, tuple(frequencies.tolist()), scaling)


def window_of(config: Any) -> int | None:
    """The window of the backbone's own attention, in tokens, where the mechanism takes
    it over; None if there is none, or if it belongs to `sliding_layers`."""
    family = family_of(config)
    is_windowed = family.windowed == "all" or SLIDING in layer_types(config, family)
    return config.sliding_window if is_windowed and not sliding_layers(config) else None
