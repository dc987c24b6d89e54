"""Models from a configuration: GPT-2 or a family of Llama's kind with a mechanism in every block."""

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import GPT2Config, PreTrainedConfig

from mka.attention import CausalAttention
from mka.config import Preset
from mka.models.families import PREFIX
from mka.models.layers import MemoryLayers
from mka.models.modeling import MODELS, memory_config


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
    """GPT-2's configuration without dropout; `intermediate_size` None: four times the hidden size."""
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
    """The configuration of a preset's size."""
    return gpt2_config(
        hidden_size=preset.hidden_size,
        num_hidden_layers=preset.num_hidden_layers,
        num_attention_heads=preset.num_attention_heads,
        vocab_size=preset.vocab_size,
        max_position_embeddings=preset.sequence_length,
        eos_token_id=eos_token_id,
    )


def build_model(
    config: PreTrainedConfig, attention_type: str, seed: int = 0, *, memory_layers: MemoryLayers = "all", **options: Any
) -> Any:
    """A causal language model of that configuration with a mechanism in every block; `options` are the mechanism's.

    memory_layers: where mka or fmka stand: "all", n for every n-th layer (n - 1, 2 n - 1, ...), or a list of layers
    from 0; the other layers have windowed attention with sinks, and their caches stay bounded.

    config: one of GPT-2, Llama, Mistral, Qwen2, Qwen3, Gemma-3 (text) or gpt-oss; where it mixes sliding and full
    layers, the mechanism stands in the full ones. Embeddings, MLPs and norms depend on (config, seed) alone, so two
    mechanisms start from the same ones. A padded batch needs `attention_mask` and, for GPT-2, which learns its
    positions, `position_ids` that count valid tokens: `(attention_mask.cumsum(1) - 1).clamp(min=0)`; `generate` makes
    them itself.
    Raises ValueError for an unknown mechanism, options it does not allow, and a family that is not supported.
    """
    full = memory_config(deepcopy(config), attention_type, options, memory_layers=memory_layers)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODELS[config.model_type.removeprefix(PREFIX)](full)
        # Drawn last and on their own, so that they do not depend on what the mechanisms drew.
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=full.initializer_range)
    return model


def mechanisms(model: nn.Module) -> list[CausalAttention]:
    """The mechanisms of a model, first layer first."""
    return [module for module in model.modules() if isinstance(module, CausalAttention)]
