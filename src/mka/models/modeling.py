"""transformers' causal models with nothing but their attention replaced, and their
configurations.

After `import mka.models`, AutoConfig and AutoModelForCausalLM load a folder that
`save_pretrained` wrote.
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
from mka.errors import InputError, check_whole
from mka.memory.local import shown_weights
from mka.memory.options import SINK_TOKENS
from mka.models.adapter import PADDING_MASK, AttentionAdapter
from mka.models.cache import taking_back
from mka.models.drafts import needed_reversible
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
from mka.models.versions import (
    CACHE_ARGUMENT,
    cache_among,
    check_version,
    columns_of,
    renamed,
    with_cache,
)
from mka.models.weights import check_finite, check_loaded, check_precision


class MemoryConfig(PreTrainedConfig):
    """What our configurations have in addition to a family's.

    Args:
        attention_type: the mechanism's name. Default: "fmka".
        attention_options: the mechanism's arguments, except those that the family
            decides. Default: None, the mechanism's defaults.
        memory_layers: which layers have mka or fmka: "all", n for every n-th, or a
            list; the others have window and sinks alone. Default: "all".
        learned_gate: whether the router's gate is a parameter, as after a conversion.
            Default: False.

    Raises ValueError for an unknown mechanism, for options that it does not have, and
    for a memory_layers that does not fit the layers.
    """

    attention_type: str = "fmka"
    attention_options: dict[str, Any] | None = None
    memory_layers: Any = "all"
    learned_gate: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        options = dict(self.attention_options or {})
        check_options(self.attention_type, options)
        # Written down although they are the defaults, so that later releases may change
        # those.
        self.attention_options = defaults_of(self.attention_type, BEFORE) | options
        memory_layers_of(self)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """transformers' own; options that a saved configuration is too old to have get
        the values that its model had."""
        values = dict(config_dict)
        if (kind := values.get("attention_type")) in ATTENTION_TYPES:
            before = {name: BEFORE[name] for name in defaults_of(kind, BEFORE)}
            values["attention_options"] = before | (values.get("attention_options") or {})
        return super().from_dict(values, **kwargs)


def with_weights(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's forward, extended by `output_attentions`: weights (B, H, T, columns
    seen) of each layer, computed in addition to the outputs.

    The result raises ValueError for a mechanism that has no such weights.
    """

    @wraps(forward)
    def showing(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The forward, with or without weights."""
        wanted = kwargs.pop("output_attentions", None)
        if not (self.config.output_attentions if wanted is None else wanted):
            return forward(self, *args, **kwargs)
        kind = self.config.attention_type
        if not ATTENTION_TYPES[kind].shows_weights:
            raise InputError(
                f"output_attentions is True; {kind} has no such weights: it mixes three "
                "attentions, over tokens, session slots and retrieved chunks; allowed: False, or "
                "another attention type"
            )
        as_dict = kwargs.pop("return_dict", None)
        # Weights are collected in a list on the side, which a compiled model could not
        # fill.
        uncompiled: Any = torch.compiler.disable(forward)
        with shown_weights() as weights:
            output = uncompiled(self, *args, return_dict=True, **kwargs)
        output.attentions = tuple(weights)
        return (
            output
            if (self.config.return_dict if as_dict is None else as_dict)
            else output.to_tuple()
        )

    return showing


class MemoryModel(PreTrainedModel):
    """Put before a class of transformers as a base: builds its model, then replaces the
    attention of every layer.

    config: a configuration of ours.

    Raises ValueError as `make_attention` does, and for a version of transformers that
    was not tested and does not decode correctly.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # Here once for all families: the classes below only name what they extend.
        cls.forward = with_weights(with_cache(cls.forward))

    def __init__(self, config: Any) -> None:
        check_version(type(self))
        super().__init__(config)
        self.config: Any
        family = family_of(config)
        dropout = config.resid_pdrop if hasattr(config, "resid_pdrop") else 0.0
        # transformers initialized all weights before the mechanisms existed; theirs
        # follow here.
        for number, block in enumerate(family.blocks(self)):
            attention = make_attention(config, number)
            attention.init_weights(config.initializer_range, residual_std(config))
            setattr(block, family.attention_name, AttentionAdapter(attention, number, dropout))
        # transformers then makes its masks by our hook, which adds no causal mask.
        self.config._attn_implementation = PADDING_MASK
        # transformers would guess it from the name of the class.
        self.loss_type = "ForCausalLM"

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, which also takes the cache under its name in other
        versions, and makes one that can take back the longest draft.

        Raises InputError if a given cache cannot.
        """
        generator: Any = super()
        kwargs = renamed(kwargs, CACHE_ARGUMENT)
        # generate(inputs, generation_config, ...): the second may be given by its place.
        settings = dict(zip(("inputs", "generation_config"), args, strict=False)) | kwargs
        with taking_back(needed_reversible(self, kwargs.get(CACHE_ARGUMENT), settings)):
            return generator.generate(*args, **kwargs)

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        """Raises InputError for another implementation than the mechanism's own."""
        if attn_implementation not in (PADDING_MASK, {"": PADDING_MASK}):
            raise InputError(
                f"attn_implementation is {attn_implementation!r}; a model with "
                f"{self.config.attention_type} computes attention itself and has no other "
                "implementation: leave it as it is"
            )

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, with an error where it would only warn.

        Raises InputError, naming the weight, for weights that are missing, left over,
        not finite, or of another shape; the latter are initialized again with
        `ignore_mismatched_sizes=True`.
        """
        report = kwargs.pop("output_loading_info", False)
        drawn = kwargs.pop("ignore_mismatched_sizes", False)
        # Mismatches are let through here, so that they are reported in our words below.
        loaded: Any = super().from_pretrained(
            *args, **kwargs, ignore_mismatched_sizes=True, output_loading_info=True
        )
        model, info = loaded
        where = model.name_or_path
        check_loaded(model, vars(model).pop("_weights_report", info), where, shapes=not drawn)
        check_finite(model, where)
        if Path(where).is_dir():
            check_precision(model, Path(where))
        return (model, info) if report else model

    def _adjust_missing_and_unexpected_keys(self, loading_info: Any) -> None:
        """Keeps the report on the weights: transformers returns that of an adapter, if
        there is one in the folder."""
        super()._adjust_missing_and_unexpected_keys(loading_info)
        self._weights_report = loading_info.to_dict()


def residual_std(config: Any) -> float:
    """The initial standard deviation of projections into the residual stream.

    GPT-2's is smaller by sqrt(2 layers) (Radford et al. 2019, section 2.3); that of the
    others is the usual one.
    """
    scaled = config.model_type.removeprefix(PREFIX) == "gpt2"
    return config.initializer_range / (math.sqrt(2 * config.num_hidden_layers) if scaled else 1)


class MkaGPT2Config(MemoryConfig, GPT2Config):
    """GPT-2's configuration and that of its mechanism, see `MemoryConfig`."""

    model_type = f"{PREFIX}gpt2"


class MkaLlamaConfig(MemoryConfig, LlamaConfig):
    """Llama's configuration and that of its mechanism, see `MemoryConfig`."""

    model_type = f"{PREFIX}llama"


class MkaMistralConfig(MemoryConfig, MistralConfig):
    """Mistral's configuration and that of its mechanism, see `MemoryConfig`."""

    model_type = f"{PREFIX}mistral"


class MkaQwen2Config(MemoryConfig, Qwen2Config):
    """Qwen2's configuration and that of its mechanism, see `MemoryConfig`."""

    model_type = f"{PREFIX}qwen2"


class MkaQwen3Config(MemoryConfig, Qwen3Config):
    """Qwen3's configuration and that of its mechanism, see `MemoryConfig`."""

    model_type = f"{PREFIX}qwen3"


class MkaGemma3TextConfig(MemoryConfig, Gemma3TextConfig):
    """Gemma 3's configuration for text and that of its mechanism, see
    `MemoryConfig`."""

    model_type = f"{PREFIX}gemma3_text"


class MkaGptOssConfig(MemoryConfig, GptOssConfig):
    """gpt-oss's configuration and that of its mechanism, see `MemoryConfig`."""

    model_type = f"{PREFIX}gpt_oss"


class MkaGPT2LMHeadModel(MemoryModel, GPT2LMHeadModel):
    """GPT-2 with its attention replaced, see `MemoryModel`."""

    config_class = MkaGPT2Config

    @wraps(GPT2LMHeadModel.forward)
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride] (it hands on what it is given)
        self, *args: Any, **kwargs: Any
    ) -> Any:
        """transformers' own. Raises InputError for a row longer than the learned
        positions."""
        if (columns := columns_of(args, kwargs)) is not None:
            self._check_length(
                columns, cache_among((*args, *kwargs.values())), kwargs.get("position_ids")
            )
        return super().forward(*args, **kwargs)

    def _check_length(self, columns: int, cache: Any, position_ids: Tensor | None) -> None:
        """Raises InputError for a row that is longer than the positions the model has
        learned."""
        limit = self.config.max_position_embeddings
        length = columns + (cache.get_seq_length() if cache else 0)
        if length <= limit:
            return
        # Columns that are padding have no position of their own, so there may be more
        # of them.
        if position_ids is not None:
            length = int(position_ids.max()) + 1
        if length > limit:
            raise InputError(
                f"the row has {length} tokens; this GPT-2 has {limit} positions; use a shorter "
                "row, a larger max_position_embeddings, or a backbone with rotary positions "
                "(Llama, Mistral, Qwen)"
            )


class MkaLlamaForCausalLM(MemoryModel, LlamaForCausalLM):
    """Llama with its attention replaced, see `MemoryModel`."""

    config_class = MkaLlamaConfig


class MkaMistralForCausalLM(MemoryModel, MistralForCausalLM):
    """Mistral with its attention replaced, see `MemoryModel`."""

    config_class = MkaMistralConfig


class MkaQwen2ForCausalLM(MemoryModel, Qwen2ForCausalLM):
    """Qwen2 with its attention replaced, see `MemoryModel`."""

    config_class = MkaQwen2Config


class MkaQwen3ForCausalLM(MemoryModel, Qwen3ForCausalLM):
    """Qwen3 with its attention replaced, see `MemoryModel`."""

    config_class = MkaQwen3Config


class MkaGemma3ForCausalLM(MemoryModel, Gemma3ForCausalLM):
    """Gemma 3 (text) with its attention replaced, see `MemoryModel`."""

    config_class = MkaGemma3TextConfig


class MkaGptOssForCausalLM(MemoryModel, GptOssForCausalLM):
    """gpt-oss with its attention replaced, see `MemoryModel`."""

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
"""Our models by the model_type of their family."""
# Older folders hold the norms of Qwen3's heads under the names of the projections that
# had them.
register_checkpoint_conversion_mapping(
    MkaQwen3Config.model_type,
    [
        WeightRenaming(rf"attention\.{name}_proj\.norm\.", f"attention.{name}_norm.")
        for name in "qk"
    ],
)
for model in MODELS.values():
    # From now on transformers finds these classes by the model_type in a config.json.
    AutoConfig.register(model.config_class.model_type, model.config_class)
    AutoModelForCausalLM.register(model.config_class, model)


def trained_distance(config: Any, options: dict[str, Any], defaults: Any) -> int | None:
    """The max_distance that a backbone was trained for, in tokens; None if window,
    chunk and sinks reach that far already.

    Args:
        config: of a family with rotary positions.
        options: those given for the mechanism.
        defaults: the parameters of the mechanism's class.

    Raises ValueError for a size that is not a whole number.
    """
    # They are added up before the mechanism is built, which checks them fully.
    for name in ("local_window", "chunk_size", "sink_tokens"):
        check_whole(name, options.get(name))
    windows = [
        options.get(name, defaults[name].default)
        for name in ("local_window", "chunk_size")
        if name in defaults
    ]
    reach = (
        sum(size for size in windows if size is not None)
        + 1
        + (options.get("sink_tokens") or SINK_TOKENS)
    )
    limit = getattr(config, "max_position_embeddings", None)
    return None if limit is None or limit < reach else limit


def memory_config(
    config: PreTrainedConfig, attention_type: str, options: dict[str, Any], **fields: Any
) -> Any:
    """The configuration of the same backbone with a mechanism.

    Args:
        config: of a backbone, converted or not.
        attention_type: the mechanism's name.
        options: the mechanism's arguments; sinks, window, key/value heads and
            max_distance that are not given follow from the backbone.
        fields: the other fields of `MemoryConfig`.

    Raises ValueError for a family that is not supported, and for options that the
    mechanism or the backbone does not allow.
    """
    values = {
        key: value
        for key, value in config.to_dict().items()
        if key not in ("model_type", "architectures")
    }
    # Mechanisms are built with plain weights, whatever the backbone had.
    for name in ("transformers_version", "quantization_config"):
        values.pop(name, None)
    check_options(attention_type, options)
    defaults = inspect.signature(ATTENTION_TYPES[attention_type]).parameters
    options = dict(options)
    # A backbone with a window of its own was trained without sinks.
    if window_of(config) is not None and "sink_tokens" in defaults:
        options.setdefault("sink_tokens", 0)
    # GPT-2 has as many key/value heads as heads, which is the mechanisms' default.
    if family_of(config).rotary and "num_kv_heads" in defaults:
        options.setdefault("num_kv_heads", kv_heads_of(config))
    if defaults["local_window"].default is None and (window := window_of(config)) is not None:
        options.setdefault("local_window", window)
    # Without rotary positions there is no distance to limit, so it would have no
    # effect.
    if not family_of(config).rotary and options.get("max_distance") is not None:
        raise InputError(
            f"max_distance is {options['max_distance']}; {config.model_type} has no rotary "
            "positions: leave it out"
        )
    # Angles that a backbone never saw in training make its scores meaningless.
    if family_of(config).rotary and "max_distance" in defaults:
        options.setdefault("max_distance", trained_distance(config, options, defaults))
    # The mechanism has the window now, so the configuration must not describe it a
    # second time.
    if not sliding_layers(config) and not rotates_by_layer(config):
        if values.get("layer_types"):
            values["layer_types"] = [FULL] * config.num_hidden_layers
        if "use_sliding_window" in values:
            values["use_sliding_window"] = False
        if family_of(config).windowed == "all":
            values["sliding_window"] = None
    # The mechanisms have no dropout between softmax and values.
    if "attn_pdrop" in values:
        values["attn_pdrop"] = 0.0
    model = MODELS[config.model_type.removeprefix(PREFIX)]
    return model.config_class(
        **values | {"attention_type": attention_type, "attention_options": options} | fields
    )
