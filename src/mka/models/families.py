"""The backbones that can carry our mechanisms, and where each of them differs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mka.attention.base import Bias
from mka.limits import InputError
from mka.ops.rotary import RotaryEmbedding


@dataclass(frozen=True)
class Family:
    """A family of transformers' models.

    blocks: the list of decoder blocks of a causal model; attention_name: the attribute of a block that is replaced;
    bias: which projections have one, from the configuration; rotary: whether positions are rotary; head_norm: whether
    queries and keys are normalised head by head.
    """

    blocks: Callable[[Any], nn.ModuleList]
    attention_name: str
    bias: Callable[[Any], Bias]
    rotary: bool
    head_norm: bool = False


def llama_blocks(model: Any) -> nn.ModuleList:
    return model.model.layers


FAMILIES = {
    "gpt2": Family(lambda model: model.transformer.h, "attn", lambda config: True, rotary=False),
    "llama": Family(llama_blocks, "self_attn", lambda config: bool(config.attention_bias), rotary=True),
    "mistral": Family(llama_blocks, "self_attn", lambda config: False, rotary=True),
    "qwen2": Family(llama_blocks, "self_attn", lambda config: "qkv", rotary=True),
    "qwen3": Family(llama_blocks, "self_attn", lambda config: bool(config.attention_bias), rotary=True, head_norm=True),
}
"""By transformers' model_type. SmolLM and SmolLM2 are of the type llama."""
PREFIX = "mka_"


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
    }
    for name, allowed in refused.items():
        if (value := getattr(config, name, None)) not in allowed:
            raise InputError(f"{name} is {value}; the mechanisms need {allowed[0]}")
    return family


def head_dim_of(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def kv_heads_of(config: Any) -> int:
    """Key/value heads of the backbone's own attention."""
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


def rotary_of(config: Any, head_dim: int) -> RotaryEmbedding:
    """The rotary embedding a configuration describes, with exactly transformers' frequencies.

    Raises ValueError for one that changes with the length of the row, or that rotates a part of each head.
    """
    parameters = config.rope_parameters
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
        frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return RotaryEmbedding(head_dim, base, tuple(frequencies.tolist()), scaling)


def window_of(config: Any) -> int | None:
    """The sliding window of the backbone's own attention. Raises ValueError where only some blocks have one."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return getattr(config, "sliding_window", None)
    sliding = {kind == "sliding_attention" for kind in layer_types}
    if len(sliding) > 1:
        raise InputError("layer_types holds windowed and full attention; allowed: one of them in all blocks")
    return config.sliding_window if True in sliding else None
