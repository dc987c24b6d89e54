"""Equal budgets: what a model costs, and the sizes at which all have the parameters, FLOPs or cache of one."""

from statistics import fmean
from typing import Any, Literal

import torch
from transformers import GPT2Config

from mka.attention import CausalAttention, build_attention
from mka.limits import InputError
from mka.models.build import mechanisms

CACHE_TOLERANCE = 0.05


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
