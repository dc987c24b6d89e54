"""transformers' GPT-2 with its attention replaced, and nothing else."""

import math
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel
from transformers.masking_utils import AttentionMaskInterface

from mka.attention import CausalAttention, build_attention
from mka.config import Preset

PADDING_MASK = "mka_padding_mask"


def padding_mask(*, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """transformers' hook for attention masks: the mechanisms are causal by themselves and want (B, T) or nothing."""
    return attention_mask


AttentionMaskInterface.register(PADDING_MASK, padding_mask)


class AttentionAdapter(nn.Module):
    """Stands where GPT-2 has its attention, and speaks to a mechanism by the contract alone."""

    def __init__(self, attention: CausalAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(
        self,
        hidden_states: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """hidden_states (B, T, C), attention_mask (B, T) -> (y (B, T, C), None: there are no weights to show)."""
        valid = None if attention_mask is None else attention_mask.bool()
        y, _state = self.attention(hidden_states, valid=valid, state=past_key_values)
        return y, None


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
        use_cache=False,
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


def build_model(attention_type: str, config: GPT2Config, seed: int = 0, **options: Any) -> GPT2LMHeadModel:
    """A GPT-2 of that configuration with a mechanism in every block; `options` are the mechanism's.

    Embeddings, MLPs and norms depend on (config, seed) alone, so two mechanisms start from the same ones. A padded
    batch needs `attention_mask` and, because GPT-2 learns its positions, `position_ids` that count valid tokens:
    `(attention_mask.cumsum(1) - 1).clamp(min=0)`.
    Raises ValueError for an unknown mechanism and for options it does not allow.
    """
    config = deepcopy(config)
    residual_std = config.initializer_range / math.sqrt(2 * config.n_layer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
        for block in model.transformer.h:
            attention = build_attention(
                attention_type, hidden_size=config.n_embd, num_heads=config.n_head, bias=True, **options
            )
            attention.init_weights(config.initializer_range, residual_std)
            block.attn = AttentionAdapter(attention)
        # Drawn last and on their own, so that they do not depend on the width of the MLPs either.
        torch.manual_seed(seed)
        for embedding in (model.transformer.wte, model.transformer.wpe):
            nn.init.normal_(embedding.weight, std=config.initializer_range)
    model.config._attn_implementation = PADDING_MASK
    return model


def checkpoint_blocks(model: GPT2LMHeadModel) -> None:
    """Keep only each block's input for the backward pass, and compute the rest again."""
    newer = hasattr(model, "activation_checkpointing_enable")  # transformers 5.20 has only the older name
    enable = model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def mechanisms(model: nn.Module) -> list[CausalAttention]:
    """The mechanisms of a model, first layer first."""
    return [module for module in model.modules() if isinstance(module, CausalAttention)]


def matched_intermediate_size(attention_type: str, config: GPT2Config, **options: Any) -> int:
    """The MLP width, a multiple of 8, at which a block has the parameters of one with mha and `config`'s width."""
    sizes = {"hidden_size": config.n_embd, "num_heads": config.n_head, "bias": True}
    spare = build_attention("mha", **sizes).num_parameters
    spare -= build_attention(attention_type, **sizes, **options).num_parameters
    width = config.n_inner or 4 * config.n_embd
    return max(8, 8 * round((width + spare / (2 * config.n_embd + 1)) / 8))
