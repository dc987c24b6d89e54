"""How a text is read: its loss, long texts in pieces; and the fingerprint that tells
one model's memory from another's."""

import hashlib
import inspect
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import Cache

from mka.attention import ATTENTION_TYPES, options_of
from mka.models.versions import CACHE_ARGUMENT

PIECE = 4096
"""Tokens that are read at a time."""
IRRELEVANT = frozenset(
    {
        # Where the model comes from.
        *("_name_or_path", "architectures", "transformers_version"),
        # The weights have a dtype of their own.
        "dtype",
        # How a text begins, ends and is continued.
        *("bos_token_id", "eos_token_id", "pad_token_id", "use_cache"),
        # What is returned in addition to the logits.
        *("output_attentions", "output_hidden_states", "return_dict"),
        # What matters before and during training only.
        "initializer_range",
        *("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop"),
    }
)
"""Fields of a configuration that change no hidden state of a trained model; every other
field counts, known or not."""


def next_token_loss(model: nn.Module, tokens: Tensor, reduction: str = "mean") -> Tensor:
    """The cross-entropy, in nats, of a model's T predictions in each row.

    Args:
        model: a causal language model.
        tokens: (B, T + 1), token ids.
        reduction: "mean", "sum" or "none". Default: "mean".

    Returns a scalar, or (B, T) with "none".
    """
    return token_loss(model(tokens[:, :-1], use_cache=False).logits, tokens, reduction)


def token_loss(logits: Tensor, tokens: Tensor, reduction: str = "mean") -> Tensor:
    """`next_token_loss` of logits (B, T, V), which predict tokens (B, T + 1) from the
    second on."""
    # In float32: a softmax over a whole vocabulary is too coarse in bfloat16.
    loss = cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction=reduction)
    return loss.view(tokens.shape[0], -1) if reduction == "none" else loss


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in evaluation mode; afterward it is in its previous mode."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@torch.no_grad()
def read_in_pieces(model: Any, ids: Tensor, cache: Cache, piece: int = PIECE) -> Tensor:
    """Read ids (B, T) on top of what the cache holds, `piece` tokens at a time (default
    4096), so that memory does not grow with T.

    Returns the logits (B, V) after the last token; empty if T is 0.
    """
    logits = torch.empty(0)
    for start in range(0, ids.shape[1], piece):
        part = ids[:, start : start + piece].to(model.device)
        output = model(part, use_cache=True, logits_to_keep=1, **{CACHE_ARGUMENT: cache})
        logits = output.logits[:, -1]
    return logits


def fingerprint(model: Any) -> str:
    """The sha256 (hex) of what decides a model's keys and values: its weights and its
    configuration."""
    digest = hashlib.sha256(
        json.dumps(deciding(model.config), sort_keys=True, default=str).encode()
    )
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        # As bytes, since numpy has no bfloat16.
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def deciding(config: Any) -> dict[str, Any]:
    """The fields of a configuration that can change a hidden state, as in
    `fingerprint`."""
    # Older releases lack fields that are now None, and options that now have a default:
    # neither may change the fingerprint.
    fields = {
        name: value
        for name, value in config.to_dict().items()
        if name not in IRRELEVANT and value is not None
    }
    if (kind := fields.get("attention_type")) in ATTENTION_TYPES:
        defaults = {
            name: value
            for name, value in options_of(kind).items()
            if value is not inspect.Parameter.empty
        }
        fields["attention_options"] = defaults | fields.get("attention_options", {})
    return fields
