"""Pretrained models with their attention replaced, starting where the pretrained one stood."""

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from mka.attention.grouped import GroupedAttention
from mka.limits import InputError
from mka.models.adapter import AttentionAdapter
from mka.models.build import mechanisms
from mka.models.families import PREFIX, family_of, head_dim_of, kv_heads_of, sliding_layers
from mka.models.layers import MemoryLayers
from mka.models.modeling import MODELS, memory_config
from mka.models.plain import check_plain, plain_name, unwrapped
from mka.models.weights import others

CONVERTIBLE = ("mha", "mqa", "gqa", "mka", "fmka")


def convert(model: Any, attention_type: str, *, memory_layers: MemoryLayers = "all", **options: Any) -> Any:
    """A new model with `model`'s weights and a mechanism in every block; `model` itself stays as it is.

    model: GPT-2, Llama, Mistral, Qwen2, Qwen3, Gemma-3 (text) or gpt-oss for causal language modelling, converted
    already or not. Where a model mixes full and sliding layers, as Gemma-3, gpt-oss, Qwen2 and Qwen3 do by layer_types,
    the full ones get the mechanism and the sliding ones compute what they did, windowed and without sinks. Projections
    q, k, v, o are kept, and so are the norms of heads, scale, rotary embeddings and sink logits of a family. With gqa
    and the model's own number of groups nothing changes; with fewer groups the heads of a group are averaged (arXiv
    2305.13245, section 2.1), with more they are repeated.

    mka reads window, sinks and retrieved chunks by one softmax (mix="joint"): within `local_window` it is the model's
    own attention exactly, and beyond it near that without any training; `max_distance` is the model's
    max_position_embeddings. `memory_layers` says which layers have it, as in `build_model`. The session average is shut
    by a gate, a parameter that starts at 0; so are all memories of fmka and of routed mka, which until it moves are the
    model's own attention within the window, with sinks.

    Of a compiled model, or one in DataParallel or DistributedDataParallel, what is wrapped is taken. All weights of
    `model` but those of a router and memories arrive, and all of the new model but those of its router and memories
    come from it.

    Raises ValueError for a family that is not supported, for what no mechanism computes (a soft cap on scores,
    attention to the future, layers neither full nor sliding, rotary embeddings that change with the length of the row
    or turn a part of a head), for a model whose kinds of layers turn differently and are all sliding, for mla
    (pretrained keys and values have no latent vector to start from), for groups that do not fit, and for a model that
    computes something else than its weights say: adapters, pruning, quantization, offloaded weights, hooks.
    """
    model = unwrapped(model)
    if not hasattr(model, "config"):
        raise InputError(f"model is a {type(model).__name__}; give a causal language model of transformers")
    config: Any = model.config
    family = family_of(config)
    if attention_type not in CONVERTIBLE:
        raise InputError(f"attention is {attention_type!r}; a pretrained model can become: {', '.join(CONVERTIBLE)}")
    ours = mechanisms(model)
    for layer in ours:
        if not isinstance(layer, GroupedAttention):
            raise InputError(f"model holds {type(layer).__name__}, which has no keys and values of its own to keep")
    first = next((layer for number, layer in enumerate(ours) if number not in sliding_layers(config)), None)
    groups = kv_heads_of(config) if first is None else first.num_kv_heads
    check_plain(model)
    if attention_type not in ("mha", "mqa"):
        options = {"num_kv_heads": groups} | options
    if first is not None and first.local_window is not None:
        kept = {"local_window": first.local_window, "sink_tokens": first.sink_tokens}
        options = kept | options
    full = memory_config(deepcopy(config), attention_type, options, memory_layers=memory_layers, learned_gate=True)
    converted = MODELS[config.model_type.removeprefix(PREFIX)](full).to(device=model.device, dtype=model.dtype)
    copy_weights(*(outside_attention(each, family.attention_name) for each in (model, converted)))
    converted.generation_config = deepcopy(model.generation_config)
    sources = [getattr(block, family.attention_name) for block in family.blocks(model)]
    with torch.no_grad():
        targets: list[Any] = mechanisms(converted)
        for source, target in zip(sources, targets, strict=True):
            own = source.attention.num_kv_heads if isinstance(source, AttentionAdapter) else kv_heads_of(config)
            for name, layer in projections(source).items():
                regroup = (own, target.num_kv_heads) if name in ("k_proj", "v_proj") else None
                copy_projection(layer, getattr(target, name), head_dim_of(config), regroup)
            if family.sink_logits:
                target.sink_logits.copy_(source.attention.sink_logits if ours else source.sinks)
    return converted.train(model.training)


def projections(attention: Any) -> dict[str, dict[str, Tensor]]:
    """q, k, v, o of a backbone's attention or of ours, and the norms of q and k where it has them: weight (outputs,
    inputs) or (D,), and bias."""
    if isinstance(attention, AttentionAdapter):
        attention = attention.attention
    if hasattr(attention, "c_attn"):  # GPT-2 keeps q, k, v side by side, and its weights transposed
        weights = attention.c_attn.weight.T.chunk(3)
        biases = attention.c_attn.bias.chunk(3)
        found = {f"{x}_proj": {"weight": w, "bias": b} for x, w, b in zip("qkv", weights, biases, strict=True)}
        return found | {"o_proj": {"weight": attention.c_proj.weight.T, "bias": attention.c_proj.bias}}
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    layers = {name: getattr(attention, name, None) for name in names}
    return {name: dict(layer.named_parameters()) for name, layer in layers.items() if layer is not None}


def outside_attention(model: nn.Module, attention_name: str) -> dict[str, Tensor]:
    return {plain_name(name): value for name, value in model.state_dict().items() if f".{attention_name}." not in name}


def copy_weights(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """Raises InputError, naming the first, unless each has a place in the other and arrives there."""
    check_same_names(source, target)
    for name, value in source.items():
        target[name].copy_(value)
    for name, value in source.items():  # two names of one tensor get the last value of both
        if not torch.equal(target[name], value.to(target[name])):
            raise InputError(
                f"{name} and the weight that it is tied to have different values; set tie_word_embeddings to False in "
                "the model's config, or tie them"
            )


def check_same_names(source: Iterable[str], target: Iterable[str]) -> None:
    source, target = set(source), set(target)
    if different := sorted(source ^ target):
        has, lacks = ("source", "converted model") if different[0] in source else ("converted model", "source")
        raise InputError(f"{different[0]} is in the {has} and not in the {lacks}{others(different, 'such')}")


def copy_projection(
    source: dict[str, Tensor], target: nn.Module, head_dim: int, groups: tuple[int, int] | None
) -> None:
    check_same_names(source, dict(target.named_parameters()))
    for name, parameter in target.named_parameters():
        value = source[name]
        if groups is not None:
            value = regrouped(value, head_dim, *groups)
        parameter.copy_(value)


def regrouped(value: Tensor, head_dim: int, before: int, after: int) -> Tensor:
    """The heads of k or v, (before D, ...), as (after D, ...): averaged within each new group, or repeated."""
    heads = value.unflatten(0, (before, head_dim))
    if before % after == 0:
        return heads.unflatten(0, (after, -1)).mean(1).flatten(0, 1)
    if after % before == 0:
        return heads.repeat_interleave(after // before, dim=0).flatten(0, 1)
    raise InputError(f"num_kv_heads is {after}; it must divide the model's {before}, or be a multiple of it")
