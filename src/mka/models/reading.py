"""Long texts, read in pieces; and what tells one model's memory from another's."""

import hashlib
import json
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from mka.models.versions import CACHE_ARGUMENT

PIECE = 4096


@torch.no_grad()
def read_in_pieces(model: Any, ids: Tensor, cache: Cache, piece: int = PIECE) -> Tensor:
    """Read ids (B, T) on top of what the cache holds, `piece` tokens at a time; the logits (B, V) after the last one.

    Peak memory is that of a piece.
    """
    logits = torch.empty(0)
    for start in range(0, ids.shape[1], piece):
        part = ids[:, start : start + piece].to(model.device)
        logits = model(part, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache}).logits[:, -1]
    return logits


def fingerprint(model: Any) -> str:
    """sha256 of what decides a model's keys and values: its weights, and how its attention is made."""
    made_by = {
        name: getattr(model.config, name, None) for name in ("model_type", "attention_type", "attention_options")
    }
    digest = hashlib.sha256(json.dumps(made_by, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
