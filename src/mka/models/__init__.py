"""Hugging Face backbones with their attention replaced."""

from mka.models.gpt2 import (
    AttentionAdapter,
    build_model,
    checkpoint_blocks,
    gpt2_config,
    matched_intermediate_size,
    mechanisms,
    preset_config,
)
from mka.models.loss import next_token_loss

__all__ = [
    "AttentionAdapter",
    "build_model",
    "checkpoint_blocks",
    "gpt2_config",
    "matched_intermediate_size",
    "mechanisms",
    "next_token_loss",
    "preset_config",
]
