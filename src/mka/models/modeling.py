"""transformers' causal models with their attention replaced, and nothing else; with configurations that say by what.

After `import mka.models`, AutoConfig and AutoModelForCausalLM load a folder that `save_pretrained` wrote.
"""

import inspect
import math
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from mka.attention import ATTENTION_TYPES
from mka.limits import SINK_TOKENS, InputError, check_whole
from mka.memory.local import shown_weights
from mka.models.adapter import PADDING_MASK, AttentionAdapter
from mka.models.families import (
    FULL,
    PREFIX,
    family_of,
    kv_heads_of,
    rotates_by_layer,
    sliding_layers,
    window_of,
)
from mka.models.layers import BEFORE, check_options, defaults_of, make_attention, memory_layers_of
from mka.models.versions import CACHE_ARGUMENT, cache_among, check_version, columns_of, renamed, with_cache
from mka.models.weights import check_finite, check_loaded, check_precision


class MemoryConfig(PreTrainedConfig):
    """What our configurations add: attention_type, the mechanism's name; attention_options, its keyword arguments;
    memory_layers, which layers have it where it is mka or fmka: "all", n for every n-th, or a list (the others have the
    window and the sinks alone); learned_gate, whether the router's gate is a parameter, as after a conversion."""

    attention_type: str = "fmka"
    attention_options: dict[str, Any] | None = None
    memory_layers: Any = "all"
    learned_gate: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        options = dict(self.attention_options or {})
        check_options(self.attention_type, options)
        self.attention_options = defaults_of(self.attention_type, BEFORE) | options
        memory_layers_of(self)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """transformers' own; what was written before an option existed is what it was then."""
        values = dict(config_dict)
        if (kind := values.get("attention_type")) in ATTENTION_TYPES:
            before = {name: BEFORE[name] for name in defaults_of(kind, BEFORE)}
            values["attention_options"] = before | (values.get("attention_options") or {})
        return super().from_dict(values, **kwargs)


def with_weights(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's forward with `output_attentions`: (B, H, T, columns seen) of each block, computed besides the kernels.

    Raises ValueError for a mechanism that has no such weights.
    """

    @wraps(forward)
    def showing(self: Any, *args: Any, **kwargs: Any) -> Any:
        wanted = kwargs.pop("output_attentions", None)
        if not (self.config.output_attentions if wanted is None else wanted):
            return forward(self, *args, **kwargs)
        if self.config.attention_type == "mka":
            raise InputError(
                "output_attentions is True; mka has no such weights: it mixes three attentions, over tokens, session "
                "slots and retrieved chunks; allowed: False, or another attention type"
            )
        as_dict = kwargs.pop("return_dict", None)
        uncompiled: Any = torch.compiler.disable(forward)
        with shown_weights() as weights:
            output = uncompiled(self, *args, return_dict=True, **kwargs)
        output.attentions = tuple(weights)
        return output if (self.config.return_dict if as_dict is None else as_dict) else output.to_tuple()

    return showing


class MemoryModel(PreTrainedModel):
    """Before a transformers class: builds it, then puts the mechanisms where its attention was."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.forward = with_weights(with_cache(cls.forward))

    def __init__(self, config: Any) -> None:
        check_version(type(self))
        super().__init__(config)
        self.config: Any
        family = family_of(config)
        dropout = config.resid_pdrop if hasattr(config, "resid_pdrop") else 0.0
        for number, block in enumerate(family.blocks(self)):
            attention = make_attention(config, number)
            attention.init_weights(config.initializer_range, residual_std(config))
            setattr(block, family.attention_name, AttentionAdapter(attention, number, dropout))
        self.config._attn_implementation = PADDING_MASK
        self.loss_type = "ForCausalLM"  # transformers guesses it from names of classes

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, which takes the cache under any name."""
        generator: Any = super()
        return generator.generate(*args, **renamed(kwargs, CACHE_ARGUMENT))

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, in which a weight that is missing, left out or of another shape is one line with its name.

        `ignore_mismatched_sizes=True` draws those of another shape anew, as there. Raises InputError.
        """
        report, drawn = kwargs.pop("output_loading_info", False), kwargs.pop("ignore_mismatched_sizes", False)
        loaded: Any = super().from_pretrained(*args, **kwargs, ignore_mismatched_sizes=True, output_loading_info=True)
        model, info = loaded
        where = model.name_or_path
        check_loaded(model, vars(model).pop("_weights_report", info), where, shapes=not drawn)
        check_finite(model, where)
        if Path(where).is_dir():
            check_precision(model, Path(where))
        return (model, info) if report else model

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """Keeps the report on the weights: where an adapter lies beside them, transformers returns the adapter's."""
        super()._adjust_missing_and_unexpected_keys(loading_info)
        self._weights_report = loading_info.to_dict()


def residual_std(config: Any) -> float:
    """GPT-2 starts the projections into the residual stream smaller."""
    scaled = config.model_type.removeprefix(PREFIX) == "gpt2"
    return config.initializer_range / (math.sqrt(2 * config.num_hidden_layers) if scaled else 1)


class MkaGPT2Config(MemoryConfig, GPT2Config):
    model_type = f"{PREFIX}gpt2"


class MkaLlamaConfig(MemoryConfig, LlamaConfig):
    model_type = f"{PREFIX}llama"


class MkaMistralConfig(MemoryConfig, MistralConfig):
    model_type = f"{PREFIX}mistral"


class MkaQwen2Config(MemoryConfig, Qwen2Config):
    model_type = f"{PREFIX}qwen2"


class MkaQwen3Config(MemoryConfig, Qwen3Config):
    model_type = f"{PREFIX}qwen3"


class MkaGemma3TextConfig(MemoryConfig, Gemma3TextConfig):
    model_type = f"{PREFIX}gemma3_text"


class MkaGptOssConfig(MemoryConfig, GptOssConfig):
    model_type = f"{PREFIX}gpt_oss"


class MkaGPT2LMHeadModel(MemoryModel, GPT2LMHeadModel):
    config_class = MkaGPT2Config

    @wraps(GPT2LMHeadModel.forward)
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] (it hands on what it is given)
        self, *args: Any, **kwargs: Any
    ) -> Any:
        if (columns := columns_of(args, kwargs)) is not None:
            self._check_length(columns, cache_among((*args, *kwargs.values())), kwargs.get("position_ids"))
        return super().forward(*args, **kwargs)

    def _check_length(self, columns: int, cache: Any, position_ids: Tensor | None) -> None:
        """Raises InputError for a row that is longer than the positions the model has learned."""
        limit, length = self.config.max_position_embeddings, columns + (cache.get_seq_length() if cache else 0)
        if length <= limit:
            return
        if position_ids is not None:  # columns that are padding have no position of their own
            length = int(position_ids.max()) + 1
        if length > limit:
            raise InputError(
                f"the row has {length} tokens; this GPT-2 has {limit} positions; use a shorter row, a larger "
                "max_position_embeddings, or a backbone with rotary positions (Llama, Mistral, Qwen)"
            )


class MkaLlamaForCausalLM(MemoryModel, LlamaForCausalLM):
    config_class = MkaLlamaConfig


class MkaMistralForCausalLM(MemoryModel, MistralForCausalLM):
    config_class = MkaMistralConfig


class MkaQwen2ForCausalLM(MemoryModel, Qwen2ForCausalLM):
    config_class = MkaQwen2Config


class MkaQwen3ForCausalLM(MemoryModel, Qwen3ForCausalLM):
    config_class = MkaQwen3Config


class MkaGemma3ForCausalLM(MemoryModel, Gemma3ForCausalLM):
    config_class = MkaGemma3TextConfig


class MkaGptOssForCausalLM(MemoryModel, GptOssForCausalLM):
    config_class = MkaGptOssConfig


MODELS: dict[str, Any] = {
    "gpt2": MkaGPT2LMHeadModel,
    "llama": MkaLlamaForCausalLM,
    "mistral": MkaMistralForCausalLM,
    "qwen2": MkaQwen2ForCausalLM,
    "qwen3": MkaQwen3ForCausalLM,
    "gemma3_text": MkaGemma3ForCausalLM,
    "gpt_oss": MkaGptOssForCausalLM,
}
# Folders hold the norms of Qwen3's heads under the names of their projections, where they once were.
register_checkpoint_conversion_mapping(
    MkaQwen3Config.model_type,
    [WeightRenaming(rf"attention\.{name}_proj\.norm\.", f"attention.{name}_norm.") for name in "qk"],
)
for model in MODELS.values():
    AutoConfig.register(model.config_class.model_type, model.config_class)
    AutoModelForCausalLM.register(model.config_class, model)


def trained_distance(config: Any, options: dict[str, Any], defaults: Any) -> int | None:
    """The distance that the backbone was made for; None where the window is no smaller."""
    for name in ("local_window", "chunk_size", "sink_tokens"):
        check_whole(name, options.get(name))  # the mechanism, which has their limits, is not made yet
    windows = [options.get(name, defaults[name].default) for name in ("local_window", "chunk_size") if name in defaults]
    reach = sum(size for size in windows if size is not None) + 1 + (options.get("sink_tokens") or SINK_TOKENS)
    limit = getattr(config, "max_position_embeddings", None)
    return None if limit is None or limit < reach else limit


def memory_config(config: PreTrainedConfig, attention_type: str, options: dict[str, Any], **fields: Any) -> Any:
    """The configuration of the same backbone with a mechanism. Raises ValueError for a family that is not supported."""
    values = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
    for name in ("transformers_version", "quantization_config"):  # weights are plain numbers here
        values.pop(name, None)
    check_options(attention_type, options)
    defaults = inspect.signature(ATTENTION_TYPES[attention_type]).parameters
    options = dict(options)
    if window_of(config) is not None and "sink_tokens" in defaults:
        options.setdefault("sink_tokens", 0)  # a backbone with a window of its own was made without sinks
    if family_of(config).rotary and "num_kv_heads" in defaults:
        options.setdefault("num_kv_heads", kv_heads_of(config))
    if defaults["local_window"].default is None and (window := window_of(config)) is not None:
        options.setdefault("local_window", window)
    if not family_of(config).rotary and options.get("max_distance") is not None:
        raise InputError(
            f"max_distance is {options['max_distance']}; {config.model_type} has no rotary positions: leave it out"
        )
    if family_of(config).rotary and "max_distance" in defaults:
        options.setdefault("max_distance", trained_distance(config, options, defaults))
    if not sliding_layers(config) and not rotates_by_layer(config):  # the mechanism has the window now
        values |= {"layer_types": [FULL] * config.num_hidden_layers} if values.get("layer_types") else {}
        values |= {"use_sliding_window": False} if "use_sliding_window" in values else {}
        if family_of(config).windowed == "all":
            values["sliding_window"] = None
    if "attn_pdrop" in values:
        values["attn_pdrop"] = 0.0  # the mechanisms have no dropout between softmax and values
    model = MODELS[config.model_type.removeprefix(PREFIX)]
    return model.config_class(**values | {"attention_type": attention_type, "attention_options": options} | fields)
