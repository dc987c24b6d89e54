"""Equal budgets: what a model costs, and the sizes at which several models cost the
same."""

from statistics import fmean
from typing import Any, Literal

import torch
from transformers import GPT2Config

from mka.attention import CausalAttention, build_attention, options_of
from mka.errors import InputError
from mka.models.build import mechanisms

CACHE_TOLERANCE = 0.05
"""How far from equal, as a share, the nearest cache may be."""


def matched_intermediate_size(
    attention_type: str,
    config: GPT2Config,
    match: Literal["parameters", "flops"] = "parameters",
    **options: Any,
) -> int:
    """The MLP width, a multiple of 8, at which a block costs as much as a block with
    mha.

    The block with mha has the width of `config`. Costs are parameters, or FLOPs per
    token as a mean over the context. Raises InputError if no width makes up for the
    difference.
    """
    # With biases, as in GPT-2's own attention.
    sizes = {"hidden_size": config.n_embd, "num_heads": config.n_head, "bias": True}
    base, attn = (
        build_attention("mha", **sizes),
        build_attention(attention_type, **sizes, **options),
    )
    width = config.n_inner or 4 * config.n_embd
    # What the attention saves, divided by what one more unit of MLP width costs.
    if match == "parameters":
        spare, unit = base.num_parameters - attn.num_parameters, 2 * config.n_embd + 1
    else:
        length = config.n_positions
        spare, unit = mean_flops(base, length) - mean_flops(attn, length), 4 * config.n_embd
    matched = 8 * round((width + spare / unit) / 8)
    if matched < 8:
        raise InputError(
            f"match is {match!r}; {attention_type} alone costs more than mha with its MLP: use "
            "other options"
        )
    return matched


def match_cache(
    attention_type: str, config: GPT2Config, groups: int, **options: Any
) -> dict[str, Any]:
    """The options with which a block's cache is as large as that of gqa; sets
    `config.head_dim`.

    Caches are in bfloat16, for a whole context. Raises InputError if the nearest size
    differs by more than CACHE_TOLERANCE.
    """
    sizes = {"hidden_size": config.n_embd, "num_heads": config.n_head}
    length, usual = config.n_positions, config.n_embd // config.n_head

    def nbytes(kind: str, **more: Any) -> int:
        """Bytes of the cache of one layer for a whole context."""
        return build_attention(kind, **sizes, **more).state_nbytes(1, length, torch.bfloat16)

    wanted = nbytes("gqa", num_kv_heads=groups)
    # mla keeps its head size, because it caches a latent of this rank instead of heads.
    option = "kv_lora_rank" if "kv_lora_rank" in options_of(attention_type) else "head_dim"
    # On the meta device the many layers need no memory; only their sizes are asked for.
    with torch.device("meta"):
        found = {
            size: nbytes(attention_type, **options | {option: size})
            for size in range(1, 2 * config.n_embd)
        }
    size = min(found, key=lambda size: (abs(found[size] - wanted), size))
    if abs(found[size] / wanted - 1) > CACHE_TOLERANCE:
        raise InputError(
            f"match is 'cache'; {attention_type} with these options keeps "
            f"{found[size] / length:,.0f} bytes per token and layer at the nearest size, gqa with "
            f"{groups} groups {wanted / length:,.0f}: use other options"
        )
    if option == "kv_lora_rank":
        return options | {option: size}
    if size != usual:
        config.head_dim = size
    return options


def mean_flops(attn: CausalAttention, length: int) -> float:
    """FLOPs per token, the mean over contexts of 1 to `length` tokens."""
    return fmean(attn.flops_per_token(context) for context in range(1, length + 1))


def model_flops(model: Any) -> float:
    """FLOPs per token of a GPT-2's forward pass: matrix products, the mean over its
    context."""
    # Two FLOPs for each weight and token: two matrices in each MLP, and the output
    # head.
    config, width = model.config, model.config.n_inner or 4 * model.config.n_embd
    blocks = sum(mean_flops(attn, config.n_positions) for attn in mechanisms(model))
    return (
        blocks + 4 * config.n_embd * width * config.n_layer + 2 * config.n_embd * config.vocab_size
    )
