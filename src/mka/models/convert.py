"""Pretrained models with their attention replaced, which start close to what they
computed."""

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from mka.attention import options_of
from mka.attention.grouped import GroupedAttention
from mka.errors import InputError
from mka.models.adapter import AttentionAdapter
from mka.models.build import mechanisms
from mka.models.families import PREFIX, family_of, head_dim_of, kv_heads_of, sliding_layers
from mka.models.layers import MemoryLayers
from mka.models.modeling import MODELS, memory_config
from mka.models.plain import check_plain, plain_name, unwrapped
from mka.models.weights import others
from mka.record.mechanisms import CONVERTIBLE


def convert(
    model: Any, attention_type: str, *, memory_layers: MemoryLayers = "all", **options: Any
) -> Any:
    """A new model with the weights of a pretrained one and a mechanism in every layer.

    Args:
        model: GPT-2, Llama, Mistral, Qwen2, Qwen3, Gemma 3 (text) or gpt-oss for causal
            language modeling, already converted or not; it is not changed. A compiled
            model, or one in DataParallel or DistributedDataParallel, is unwrapped.
        attention_type: "mha", "mqa", "gqa", "mka" or "fmka".
        memory_layers: which layers have mka or fmka: "all", n for every n-th (n - 1, 2
            n - 1, ...), or a list of layers counted from 0. The others have windowed
            attention with sinks. Default: "all".
        options: arguments of the mechanism, except those that the model's configuration
            decides: hidden_size, num_heads, head_dim, bias and rotary. If not given,
            num_kv_heads is the model's own, and max_distance its
            max_position_embeddings; mha, mqa and gqa keep a window that the model has,
            and so does any mechanism if the model was converted before.

    What is kept: embeddings, MLPs and norms; the projections q, k, v, o; and a family's
    norms of heads, scale, rotary embeddings and sink logits. New are only the weights
    of routers and memories. With gqa and the model's own number of key/value heads
    nothing changes; with fewer, the heads of each new group are averaged (arXiv
    2305.13245, section 2.1), with more they are repeated. Where a model mixes full and
    sliding layers, as Gemma 3, gpt-oss, Qwen2 and Qwen3 do by layer_types, the full
    ones get the mechanism; the sliding ones compute what they did before, windowed and
    without sinks.

    mka with mix="joint" is exactly the model's own attention within `local_window`, and
    close to it beyond, without any training: one softmax reads window, sinks and
    retrieved chunks, and the session average is shut off by a gate, a parameter that
    starts at 0. In fmka and in mka with mix="routed" the gate shuts off all memories;
    until it moves they are the model's own attention within the window, with sinks.

    Raises ValueError

    * for a family that is not supported, or a configuration that no mechanism can
    compute: a soft
      cap on scores, attention to the future, layers neither full nor sliding, rotary
      embeddings that change with the length of the row or rotate a part of each head,
      or sliding layers only where the kinds of layers have different rotary embeddings;
    * for mla, since pretrained keys and values have no latent vector to start from;
    * for options that the mechanism does not allow, and a num_kv_heads that does not
    fit the
      model's;
    * for a model that computes something other than its weights say: adapters, pruning,
      quantization, offloaded weights, hooks.
    """
    model = unwrapped(model)
    if not hasattr(model, "config"):
        raise InputError(
            f"model is a {type(model).__name__}; give a causal language model of transformers"
        )
    config: Any = model.config
    family = family_of(config)
    if attention_type not in CONVERTIBLE:
        raise InputError(
            f"attention is {attention_type!r}; a pretrained model can become: "
            f"{', '.join(CONVERTIBLE)}"
        )
    # A model that was converted before is converted from what it has now.
    ours = mechanisms(model)
    for layer in ours:
        if not isinstance(layer, GroupedAttention):
            raise InputError(
                f"model holds {type(layer).__name__}, which has no keys and values of its own "
                "to keep"
            )
    first = next(
        (layer for number, layer in enumerate(ours) if number not in sliding_layers(config)), None
    )
    # Of a converted model, what it has now counts, not what its family had originally.
    groups = kv_heads_of(config) if first is None else first.num_kv_heads
    check_plain(model)
    if "num_kv_heads" in options_of(attention_type):
        options = {"num_kv_heads": groups} | options
    if first is not None and first.local_window is not None:
        kept = {"local_window": first.local_window, "sink_tokens": first.sink_tokens}
        options = kept | options
    full = memory_config(
        deepcopy(config), attention_type, options, memory_layers=memory_layers, learned_gate=True
    )
    # In the model's dtype before weights are copied, so that none is rounded on the
    # way.
    converted = MODELS[config.model_type.removeprefix(PREFIX)](full).to(
        device=model.device, dtype=model.dtype
    )
    copy_weights(
        outside_attention(model, family.attention_name),
        outside_attention(converted, family.attention_name),
    )
    converted.generation_config = deepcopy(model.generation_config)
    sources = [getattr(block, family.attention_name) for block in family.blocks(model)]
    with torch.no_grad():
        targets: list[Any] = mechanisms(converted)
        for source, target in zip(sources, targets, strict=True):
            # Sliding layers keep their own number of key/value heads, whatever the
            # others get.
            own = (
                source.attention.num_kv_heads
                if isinstance(source, AttentionAdapter)
                else kv_heads_of(config)
            )
            for name, layer in projections(source).items():
                # Norms of heads are the same for all groups, and are copied as they
                # are.
                regroup = (own, target.num_kv_heads) if name in ("k_proj", "v_proj") else None
                copy_projection(layer, getattr(target, name), head_dim_of(config), regroup)
            if family.sink_logits:
                target.sink_logits.copy_(source.attention.sink_logits if ours else source.sinks)
    return converted.train(model.training)


def projections(attention: Any) -> dict[str, dict[str, Tensor]]:
    """The parameters of q, k, v, o, and of the norms of q and k if there are any, of a
    backbone's attention or of ours: by layer, "weight" (outputs, inputs) or (D,), and
    "bias"."""
    if isinstance(attention, AttentionAdapter):
        attention = attention.attention
    # GPT-2 keeps q, k, v side by side, and its weights transposed.
    if hasattr(attention, "c_attn"):
        weights = attention.c_attn.weight.T.chunk(3)
        biases = attention.c_attn.bias.chunk(3)
        found = {
            f"{x}_proj": {"weight": w, "bias": b}
            for x, w, b in zip("qkv", weights, biases, strict=True)
        }
        return found | {
            "o_proj": {"weight": attention.c_proj.weight.T, "bias": attention.c_proj.bias}
        }
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    layers = {name: getattr(attention, name, None) for name in names}
    return {
        name: dict(layer.named_parameters()) for name, layer in layers.items() if layer is not None
    }


def outside_attention(model: nn.Module, attention_name: str) -> dict[str, Tensor]:
    """A model's weights by plain name, without those of the modules called
    `attention_name`."""
    return {
        plain_name(name): value
        for name, value in model.state_dict().items()
        if f".{attention_name}." not in name
    }


def copy_weights(source: dict[str, Tensor], target: dict[str, Tensor]) -> None:
    """Copy all weights of `source` into those of `target`, by name.

    Raises InputError, naming the first, if a weight is missing on either side, or does
    not arrive.
    """
    check_same_names(source, target)
    for name, value in source.items():
        target[name].copy_(value)
    # Two names of one tensor both get the value that was copied last.
    for name, value in source.items():
        if not torch.equal(target[name], value.to(target[name])):
            raise InputError(
                f"{name} and the weight that it is tied to have different values; set "
                "tie_word_embeddings to False in the model's config, or tie them"
            )


def check_same_names(source: Iterable[str], target: Iterable[str]) -> None:
    """Raises InputError, naming the first difference, unless both have the same
    names."""
    source, target = set(source), set(target)
    if different := sorted(source ^ target):
        has, lacks = (
            ("source", "converted model")
            if different[0] in source
            else ("converted model", "source")
        )
        raise InputError(
            f"{different[0]} is in the {has} and not in the {lacks}{others(different, 'such')}"
        )


def copy_projection(
    source: dict[str, Tensor], target: nn.Module, head_dim: int, groups: tuple[int, int] | None
) -> None:
    """Copy the weight and bias of one projection, or the weight of a norm.

    Args:
        source: its parameters by name.
        target: the layer to copy to.
        head_dim: D.
        groups: numbers of key/value heads before and after, if they are k or v. None:
            copied as they are.

    Raises InputError if one has a parameter that the other lacks, or the groups do not
    fit.
    """
    check_same_names(source, dict(target.named_parameters()))
    for name, parameter in target.named_parameters():
        value = source[name]
        if groups is not None:
            value = regrouped(value, head_dim, *groups)
        parameter.copy_(value)


def regrouped(value: Tensor, head_dim: int, before: int, after: int) -> Tensor:
    """The heads of k or v, (before * D, ...), as (after * D, ...): averaged within each
    new group (arXiv 2305.13245, section 2.1), or repeated.

    Raises InputError unless one number divides the other.
    """
    heads = value.unflatten(0, (before, head_dim))
    if before % after == 0:
        return heads.unflatten(0, (after, -1)).mean(1).flatten(0, 1)
    # The copies together compute exactly what the one head did.
    if after % before == 0:
        return heads.repeat_interleave(after // before, dim=0).flatten(0, 1)
    raise InputError(
        f"num_kv_heads is {after}; it must divide the model's {before}, or be a multiple of it"
    )
