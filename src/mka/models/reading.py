"""Long texts, read in pieces; and what tells one model's memory from another's."""

import hashlib
import inspect
import json
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from mka.attention import ATTENTION_TYPES
from mka.models.versions import CACHE_ARGUMENT

PIECE = 4096
IRRELEVANT = frozenset(
    {
        *("_name_or_path", "architectures", "transformers_version"),  # where it comes from
        "dtype",  # the weights have their own
        *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),  # how a text begins, ends and is gone on with
        *("output_attentions", "output_hidden_states", "return_dict"),  # what is returned besides
        "initializer_range",  # before training
        *("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"),  # in training
    }
)
"""Fields of a configuration that change no hidden state of a trained model; every other one counts, known or not."""


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
    """sha256 of what decides a model's keys and values: its weights and its configuration."""
    digest = hashlib.sha256(json.dumps(deciding(model.config), sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def deciding(config: Any) -> dict[str, Any]:
    """The configuration without what is irrelevant; a field that is None is as one that an older release does not
    have, and an option that is not given is the mechanism's default."""
    fields = {name: value for name, value in config.to_dict().items() if name not in IRRELEVANT and value is not None}
    if (kind := fields.get("attention_type")) in ATTENTION_TYPES:
        parameters = inspect.signature(ATTENTION_TYPES[kind]).parameters.values()
        defaults = {option.name: option.default for option in parameters if option.default is not option.empty}
        fields["attention_options"] = defaults | fields.get("attention_options", {})
    return fields
