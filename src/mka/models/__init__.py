"""Hugging Face models with their attention replaced.

Importing this module registers them with transformers' Auto classes.
"""

from mka.models.adapter import AttentionAdapter
from mka.models.build import build_model, gpt2_config, mechanisms, preset_config
from mka.models.cache import REVERSIBLE, StateLayer, memory_cache, states
from mka.models.convert import convert
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
from mka.models.reading import evaluating, fingerprint, next_token_loss, read_in_pieces, token_loss
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
    "evaluating",
    "fingerprint",
    "gpt2_config",
    "mechanisms",
    "memory_cache",
    "next_token_loss",
    "preset_config",
    "read_in_pieces",
    "states",
    "token_loss",
]
