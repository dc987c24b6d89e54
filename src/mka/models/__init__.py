"""Hugging Face backbones with their attention replaced; importing this registers them with the Auto classes."""

from mka.models.adapter import AttentionAdapter
from mka.models.budgets import match_cache, matched_intermediate_size, model_flops
from mka.models.build import (
    build_model,
    gpt2_config,
    mechanisms,
    preset_config,
)
from mka.models.cache import REVERSIBLE, StateLayer, memory_cache, states
from mka.models.convert import convert
from mka.models.loss import next_token_loss
from mka.models.modeling import (
    MODELS,
    MkaGemma3ForCausalLM,
    MkaGemma3TextConfig,
    MkaGPT2Config,
    MkaGPT2LMHeadModel,
    MkaGptOssConfig,
    MkaGptOssForCausalLM,
    MkaLlamaConfig,
    MkaLlamaForCausalLM,
    MkaMistralConfig,
    MkaMistralForCausalLM,
    MkaQwen2Config,
    MkaQwen2ForCausalLM,
    MkaQwen3Config,
    MkaQwen3ForCausalLM,
)
from mka.models.reading import fingerprint, read_in_pieces
from mka.models.versions import CACHE_ARGUMENT, cache_of, cache_parameter, checkpoint_blocks

__all__ = [
    "CACHE_ARGUMENT",
    "MODELS",
    "REVERSIBLE",
    "AttentionAdapter",
    "MkaGPT2Config",
    "MkaGPT2LMHeadModel",
    "MkaGemma3ForCausalLM",
    "MkaGemma3TextConfig",
    "MkaGptOssConfig",
    "MkaGptOssForCausalLM",
    "MkaLlamaConfig",
    "MkaLlamaForCausalLM",
    "MkaMistralConfig",
    "MkaMistralForCausalLM",
    "MkaQwen2Config",
    "MkaQwen2ForCausalLM",
    "MkaQwen3Config",
    "MkaQwen3ForCausalLM",
    "StateLayer",
    "build_model",
    "cache_of",
    "cache_parameter",
    "checkpoint_blocks",
    "convert",
    "fingerprint",
    "gpt2_config",
    "match_cache",
    "matched_intermediate_size",
    "mechanisms",
    "memory_cache",
    "model_flops",
    "next_token_loss",
    "preset_config",
    "read_in_pieces",
    "states",
]
