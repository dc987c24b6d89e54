"""New models from a configuration: GPT-2, Llama and relatives, with a mechanism in
every layer."""

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, PreTrainedConfig

from mka.attention import CausalAttention
from mka.models.families import PREFIX
from mka.models.layers import MemoryLayers
from mka.models.modeling import MODELS, memory_config
from mka.record.config import Preset


def gpt2_config(
    *,
    hidden_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    vocab_size: int,
    max_position_embeddings: int,
    intermediate_size: int | None = None,
    eos_token_id: int = 0,
) -> GPT2Config:
    """A configuration of GPT-2 without dropout.

    Args:
        hidden_size: C.
        num_hidden_layers: layers.
        num_attention_heads: H; it must divide C.
        vocab_size: V, token ids.
        max_position_embeddings: positions that are learned, the longest row in tokens.
        intermediate_size: width of the MLPs. Default: None, 4 C.
        eos_token_id: the token that ends a text, and begins one. Default: 0.
    """
    return GPT2Config(
        n_embd=hidden_size,
        n_layer=num_hidden_layers,
        n_head=num_attention_heads,
        vocab_size=vocab_size,
        n_positions=max_position_embeddings,
        n_inner=intermediate_size,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
    )


def preset_config(preset: Preset, eos_token_id: int = 0) -> GPT2Config:
    """GPT-2's configuration in the size of a preset; `eos_token_id` ends a text
    (default 0)."""
    return gpt2_config(
        hidden_size=preset.hidden_size,
        num_hidden_layers=preset.num_hidden_layers,
        num_attention_heads=preset.num_attention_heads,
        vocab_size=preset.vocab_size,
        max_position_embeddings=preset.sequence_length,
        eos_token_id=eos_token_id,
    )


def build_model(
    config: PreTrainedConfig,
    attention_type: str,
    seed: int = 0,
    *,
    memory_layers: MemoryLayers = "all",
    **options: Any,
) -> Any:
    """A new causal language model with a mechanism in every layer.

    Args:
        config: of GPT-2, Llama, Mistral, Qwen2, Qwen3, Gemma 3 (text) or gpt-oss. Where
            it mixes sliding and full layers, the full ones get the mechanism. It is not
            changed.
        attention_type: a name in `ATTENTION_TYPES`: mha, mqa, gqa, mla, mka or fmka.
        seed: seed of the random weights. Embeddings, MLPs and norms depend on config
            and seed alone, so that models with different mechanisms start from the same
            ones. Default: 0.
        memory_layers: which layers have mka or fmka: "all", n for every n-th (n - 1, 2
            n - 1, ...), or a list of layers counted from 0. The others have windowed
            attention with sinks, and their caches stay bounded. Default: "all".
        options: arguments of the mechanism, except those that the configuration
            decides: hidden_size, num_heads, head_dim, bias and rotary.

    A padded batch needs `attention_mask`, and with GPT-2, which learns its positions,
    also `position_ids` that count valid tokens: `(attention_mask.cumsum(1) -
    1).clamp(min=0)`; `generate` makes both itself.

    Raises ValueError for an unknown mechanism, for options that it does not allow, for
    a memory_layers that does not fit the layers, and for a family or a configuration
    that is not supported.
    """
    full = memory_config(deepcopy(config), attention_type, options, memory_layers=memory_layers)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODELS[config.model_type.removeprefix(PREFIX)](full)
        # Embeddings are drawn again, from the same seed, so that they do not depend on
        # what the mechanisms drew before.
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=full.initializer_range)
    return model


def mechanisms(model: nn.Module) -> list[CausalAttention]:
    """The mechanisms of a model, in the order of its layers; empty for a model without
    any."""
    return [module for module in model.modules() if isinstance(module, CausalAttention)]
