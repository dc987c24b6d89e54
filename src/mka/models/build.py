"""Models from a configuration: GPT-2 or a family of Llama's kind with a mechanism in every block."""

from copy import deepcopy
from statistics import fmean
from typing import Any, Literal

import torch
from torch import nn
from transformers import GPT2Config, PreTrainedConfig, PreTrainedModel

from mka.attention import CausalAttention, build_attention
from mka.config import InputError, Preset
from mka.models.families import PREFIX
from mka.models.modeling import MODELS, memory_config

CACHE_TOLERANCE = 0.05


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


def build_model(config: PreTrainedConfig, attention_type: str, seed: int = 0, **options: Any) -> Any:
    """A causal language model of that configuration with a mechanism in every block; `options` are the mechanism's.

    config: one of GPT-2, Llama, Mistral, Qwen2 or Qwen3. Embeddings, MLPs and norms depend on (config, seed) alone, so
    two mechanisms start from the same ones. A padded batch needs `attention_mask` and, for GPT-2, which learns its
    positions, `position_ids` that count valid tokens: `(attention_mask.cumsum(1) - 1).clamp(min=0)`; `generate` makes
    them itself.
    Raises ValueError for an unknown mechanism, options it does not allow, and a family that is not supported.
    """
    full = memory_config(deepcopy(config), attention_type, options)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MODELS[config.model_type.removeprefix(PREFIX)](full)
        # Drawn last and on their own, so that they do not depend on what the mechanisms drew.
        torch.manual_seed(seed)
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=full.initializer_range)
    return model


def checkpoint_blocks(model: PreTrainedModel) -> None:
    """Keep only each block's input for the backward pass, and compute the rest again."""
    newer = hasattr(model, "activation_checkpointing_enable")  # transformers 5.20 has only the older name
    enable = model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def mechanisms(model: nn.Module) -> list[CausalAttention]:
    """The mechanisms of a model, first layer first."""
    return [module for module in model.modules() if isinstance(module, CausalAttention)]


def matched_intermediate_size(
    attention_type: str, config: GPT2Config, match: Literal["parameters", "flops"] = "parameters", **options: Any
) -> int:
    """The MLP width, a multiple of 8, at which a block costs what one with mha and `config`'s width does.

    Costs are parameters, or FLOPs of a token, the mean over the context. Raises InputError where no width does.
    """
    sizes = {"hidden_size": config.n_embd, "num_heads": config.n_head, "bias": True}
    base, attn = build_attention("mha", **sizes), build_attention(attention_type, **sizes, **options)
    width = config.n_inner or 4 * config.n_embd
    if match == "parameters":
        spare, unit = base.num_parameters - attn.num_parameters, 2 * config.n_embd + 1
    else:
        length = config.n_positions
        spare, unit = mean_flops(base, length) - mean_flops(attn, length), 4 * config.n_embd
    matched = 8 * round((width + spare / unit) / 8)
    if matched < 8:
        raise InputError(
            f"match is {match!r}; {attention_type} alone costs more than mha with its MLP: use other options"
        )
    return matched


def match_cache(attention_type: str, config: GPT2Config, groups: int, **options: Any) -> dict[str, Any]:
    """Give `config` the head size, and return the options, with which a block's cache is as large as that of gqa.

    Caches are in bfloat16, of a whole context. mla keeps its head size: its latent rank is what is cached. Raises
    InputError where the nearest size is further away than CACHE_TOLERANCE.
    """
    sizes = {"hidden_size": config.n_embd, "num_heads": config.n_head}
    length, usual = config.n_positions, config.n_embd // config.n_head

    def nbytes(kind: str, **more: Any) -> int:
        return build_attention(kind, **sizes, **more).state_nbytes(1, length, torch.bfloat16)

    wanted = nbytes("gqa", num_kv_heads=groups)
    option = "kv_lora_rank" if attention_type == "mla" else "head_dim"
    with torch.device("meta"):  # only their sizes are asked for
        found = {size: nbytes(attention_type, **options | {option: size}) for size in range(1, 2 * config.n_embd)}
    size = min(found, key=lambda size: (abs(found[size] - wanted), size))
    if abs(found[size] / wanted - 1) > CACHE_TOLERANCE:
        raise InputError(
            f"match is 'cache'; {attention_type} with these options keeps {found[size] / length:,.0f} bytes a token "
            f"and layer at the nearest, gqa with {groups} groups {wanted / length:,.0f}: use other options"
        )
    if option == "kv_lora_rank":
        return options | {option: size}
    if size != usual:
        config.head_dim = size
    return options


def mean_flops(attn: CausalAttention, length: int) -> float:
    """FLOPs of a token, the mean over contexts of 1 to `length` tokens."""
    return fmean(attn.flops_per_token(context) for context in range(1, length + 1))


def model_flops(model: Any) -> float:
    """FLOPs of a token's forward pass through a GPT-2: matrix products alone, the mean over its context."""
    config, width = model.config, model.config.n_inner or 4 * model.config.n_embd
    blocks = sum(mean_flops(attn, config.n_positions) for attn in mechanisms(model))
    return blocks + 4 * config.n_embd * width * config.n_layer + 2 * config.n_embd * config.vocab_size
