"""Small backbones of every family, and what they must hold with a cache."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from mka.attention import ATTENTION_TYPES
from mka.models import build_model, gpt2_config

VOCAB_SIZE = 50
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": VOCAB_SIZE,
}
LLAMA: dict[str, Any] = SIZES | {
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
TOKEN_IDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
LLAMA3_ROPE: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GEMMA: dict[str, Any] = {
    "head_dim": 12,
    "query_pre_attn_scalar": 20,
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention"],
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
    },
}
BACKBONES: dict[str, PreTrainedConfig] = {
    "gpt2": gpt2_config(**SIZES, max_position_embeddings=128),
    "llama": LlamaConfig(**LLAMA, **TOKEN_IDS),
    "llama, scaled and biased": LlamaConfig(
        **LLAMA, **TOKEN_IDS, rope_parameters=LLAMA3_ROPE, attention_bias=True
    ),
    "mistral": MistralConfig(**LLAMA, **TOKEN_IDS, sliding_window=9),
    "qwen2": Qwen2Config(**LLAMA, **TOKEN_IDS),
    "qwen3": Qwen3Config(**LLAMA, **TOKEN_IDS, head_dim=12),
    "gemma3": Gemma3TextConfig(**LLAMA, **TOKEN_IDS, **GEMMA),
}
TWO_BACKBONES = ("gpt2", "llama")
MEMORIES: dict[str, dict[str, Any]] = {"mka": {"session_stride": 3}, "fmka": {"index_size": 5}}
OPTIONS = {kind: {"local_window": 6} | MEMORIES.get(kind, {}) for kind in ATTENTION_TYPES}
for memory_options in (OPTIONS["mka"], OPTIONS["fmka"]):
    memory_options |= {"chunk_size": 3, "top_k": 2}


def shake(model: nn.Module, std: float = 0.2) -> Any:
    """Every parameter random, norms and routers included, so that nothing is what it happens to
    start from."""
    torch.manual_seed(5)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std)
    return model.eval()


def make_model(
    backbone: str,
    kind: str,
    windowed: bool = True,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> Any:
    options: dict[str, Any] = OPTIONS[kind] | ({} if windowed else {"local_window": None}) | changes
    model = shake(build_model(BACKBONES[backbone], kind, **options).to(dtype))
    model.generation_config.eos_token_id = None  # what is generated does not end by chance
    return model


def tokens(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randint(
        1, VOCAB_SIZE, (rows, columns), generator=torch.Generator().manual_seed(seed)
    )


def positions_of(mask: Tensor) -> Tensor:
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def greedy_without_cache(model: Any, prompt: Tensor, new_tokens: int) -> Tensor:
    """Every token by a forward pass over the whole row."""
    with torch.no_grad():
        for _ in range(new_tokens):
            prompt = torch.cat(
                [prompt, model(prompt, use_cache=False).logits[:, -1:].argmax(-1)], dim=1
            )
    return prompt
