"""All that differs between versions of transformers, and checks that none of it goes
wrong silently.

The cache is recognized by its class, whatever a version calls it on its way: through
`forward` and `generate` of a model (`with_cache`, which also checks that every layer
has used it), and down to the layers (`cache_among`).
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any, get_args

import torch
import transformers
from torch import Tensor, nn
from transformers import Cache, LlamaForCausalLM, PreTrainedModel

from mka.attention import ATTENTION_TYPES, options_of
from mka.errors import InputError
from mka.models.cache import StateLayer
from mka.models.families import FAMILIES, FULL, PREFIX, SLIDING, family_of
from mka.ops.packing import documents_of

OLDEST, NEWEST = (5, 20), (5, 24)
"""The versions of transformers that were tested: these and those between, as in
pyproject.toml."""
CACHE_NAMES = ("cache", "past_key_values")
"""Names of the cache in the tested versions: up to 5.23 the second."""


def installed() -> str:
    """The version of transformers that is installed, and those that were tested, in
    words."""
    oldest, newest = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
    return f"transformers {transformers.__version__} is installed; tested: {oldest} to {newest}"


# The cache on its way from a model's arguments to its layers.


def cache_parameter(function: Callable[..., Any]) -> str | None:
    """The name of a function's parameter that is annotated as a cache; None if there is
    none."""
    for name, parameter in inspect.signature(function).parameters.items():
        # An annotation is a type or a union of types, which get_args takes apart.
        kinds = (parameter.annotation, *get_args(parameter.annotation))
        if any(isinstance(kind, type) and issubclass(kind, Cache) for kind in kinds):
            return name
    return None


CACHE_ARGUMENT = cache_parameter(LlamaForCausalLM.forward) or CACHE_NAMES[0]
"""The name of the cache in the installed version. Our models take it under any of its
names."""


def cache_among(values: Iterable[Any]) -> Cache | None:
    """The cache among the arguments or outputs of a call; None if there is none. Raises
    InputError for two different ones."""
    found: Cache | None = None
    for value in values:
        if isinstance(value, Cache):
            if found is not None and found is not value:
                raise InputError(
                    f"a call was given two caches, where one is allowed; {installed()}"
                )
            found = value
    return found


def cache_of(output: Any) -> Cache | None:
    """The cache in what a model or `generate` returned; None if there is none."""
    return cache_among(output if isinstance(output, tuple) else output.values())


def renamed(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    """The arguments of a call with the cache, if there is one, under `name`. Raises
    InputError for a cache that is not transformers'."""
    cache = cache_among(arguments.values())
    for key in CACHE_NAMES:
        if not isinstance(arguments.get(key), Cache | None):
            kind = type(arguments[key]).__name__
            raise InputError(
                f"{key} is a {kind}; allowed: a Cache of transformers, such as memory_cache "
                "makes, or None"
            )
    # None under another version's name is no cache, and would be an unknown argument
    # here.
    others = {
        key: value
        for key, value in arguments.items()
        if not isinstance(value, Cache) and (value is not None or key not in CACHE_NAMES)
    }
    return others if cache is None else others | {name: cache}


def lost(what: str, module: nn.Module) -> InputError:
    """The error for a cache that did not arrive where it was needed; `what` says how it
    shows."""
    advice = (
        "; gradient checkpointing leaves the cache out: use model.eval(), or "
        "use_cache=False and no cache"
    )
    return InputError(
        f"{what}, so its result would be wrong; {installed()}{advice if module.training else ''}"
    )


def cache_for_block(attention: nn.Module, number: int, arguments: dict[str, Any]) -> Cache | None:
    """The cache among what a layer passes to its attention; None if there is none.

    Args:
        attention: the attention, for the error's advice.
        number: of the layer.
        arguments: all but hidden states, mask and positions, under whatever names they
            have in this version.

    Raises InputError if a cache is asked for and there is none.
    """
    cache = cache_among(arguments.values())
    if cache is None and arguments.get("use_cache"):
        raise lost(f"layer {number} should use a cache and was given none", attention)
    return cache


def lengths(cache: Cache | None) -> list[int]:
    """How many columns each layer of the cache has seen; empty without a cache."""
    layers = getattr(cache, "layers", ())
    return [layer.get_seq_length() if isinstance(layer, StateLayer) else 0 for layer in layers]


def with_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's forward, extended so that it takes the cache under any of its names,
    and documents that are packed in rows (`with_documents`).

    The result raises InputError unless every layer that ran has used the cache: the one
    that went in, or else came out, must have grown by the call's columns in each of
    them.
    """
    name = cache_parameter(forward) or CACHE_ARGUMENT
    # Kept out of a compiled graph, in which the counts would be constants.
    check: Any = torch.compiler.disable(check_use)

    @wraps(forward)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        """The forward, with its cache checked afterward."""
        kwargs = renamed(kwargs, name)
        given = cache_among((*args, *kwargs.values()))
        kwargs = with_documents(kwargs, given)
        # Layers grow in place, so what they hold is noted before the call.
        before = lengths(given)
        output = forward(self, *args, **kwargs)
        if given is not None or kwargs.get("use_cache") is not False:
            check(
                self, given, before, output, columns_of(args, kwargs), bool(kwargs.get("use_cache"))
            )
        return output

    return checked


PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""Arguments that tell flash attention where documents end that are packed in one
row."""


def with_documents(arguments: dict[str, Any], cache: Cache | None) -> dict[str, Any]:
    """The arguments of a call with packed documents told apart by position_ids alone,
    and use_cache=False if a row holds several.

    Raises InputError for ends and positions of documents that do not fit together, and
    for several documents in a row together with a cache.
    """
    # Mechanisms tell documents apart by positions, so ends of documents become
    # positions.
    ends = arguments.get("cu_seq_lens_q")
    others = {name: value for name, value in arguments.items() if name not in PACKED}
    if ends is not None:
        others["position_ids"] = positions_of(ends, arguments)
    positions, mask = others.get("position_ids"), others.get("attention_mask")
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.shape[1] < 2:
        return others
    valid = None
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= positions.shape[1]:
        valid = mask[:, -positions.shape[1] :].bool().to(positions.device)
    # A compiled model cannot branch on values, but it can assert: positions rise
    # between any two valid tokens next to each other.
    if torch.compiler.is_compiling():
        rises = positions.diff(dim=1) > 0
        if valid is not None:
            rises = rises | ~valid[:, :-1] | ~valid[:, 1:]
        check: Any = torch._assert_async  # pyright: ignore[reportPrivateImportUsage]
        check(rises.all(), COMPILED)
        return others
    if documents_of(positions, valid) is None:
        return others
    if cache is not None or others.get("use_cache"):
        raise InputError(
            "position_ids start again within a row: several documents are packed in it, and a "
            "cache continues one; give them as rows of their own, or use_cache=False and no cache"
        )
    # Unless told not to, transformers would make a cache, which continues one document
    # only.
    return others | {"use_cache": False}


COMPILED = (
    "documents are packed in one row, by position_ids that start again; a compiled "
    "model cannot keep them apart"
)


def positions_of(ends: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Positions (1, T) that start again where the documents of a row end.

    Args:
        ends: (documents + 1,), from 0 to T, as in cu_seq_lens.
        arguments: of the call, which has one row.

    Raises InputError if the ends do not fit the row, or its position_ids if there are
    any.
    """
    given, columns = arguments.get("position_ids"), columns_of((), arguments)
    rows = next(
        (
            arguments[name]
            for name in ("input_ids", "inputs_embeds")
            if arguments.get(name) is not None
        ),
        None,
    )
    count = len(rows) if rows is not None else 1
    last, sizes = int(ends[-1]), ends.diff()
    if (
        count != 1
        or int(ends[0]) != 0
        or bool((sizes <= 0).any())
        or (columns is not None and last != columns)
    ):
        raise InputError(
            f"cu_seq_lens_q is {ends.tolist()}; it must rise from 0 to the tokens of one row, "
            f"which are {columns} in {count} {'row' if count == 1 else 'rows'}"
        )
    positions = torch.arange(last, device=ends.device) - ends[:-1].repeat_interleave(sizes)
    if isinstance(given, Tensor) and not torch.equal(given.flatten().to(positions), positions):
        raise InputError(
            "cu_seq_lens_q and position_ids tell documents apart in different places; give one "
            "of them"
        )
    return positions[None]


def check_use(
    model: Any,
    given: Cache | None,
    before: list[int],
    output: Any,
    columns: int | None,
    asked: bool,
) -> None:
    """Raises InputError unless the cache of a call has grown in every layer.

    Args:
        model: the model.
        given: the cache that went in. None: the one that came out counts.
        before: columns of each layer before the call.
        output: of the call.
        columns: of the call; None if they are not known.
        asked: whether use_cache was True.
    """
    used = cache_of(output) if given is None else given
    if used is not None:
        check_growth(model, before, lengths(used), columns)
    # Checkpointed layers run again in the backward pass, and transformers gives them no
    # cache.
    elif asked and not (model.training and any(blocks_with_checkpoints(model))):
        raise lost("use_cache is True and no cache was made", model)


def blocks_with_checkpoints(model: Any) -> Iterator[bool]:
    """For each layer, whether its activations are checkpointed."""
    for block in family_of(model.config).blocks(model):
        yield getattr(block, "gradient_checkpointing", False)


def columns_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """How many columns a call of a model has, by its first argument, input_ids or
    inputs_embeds; None if there is none of them."""
    rows = args[0] if args and args[0] is not None else kwargs.get("input_ids")
    rows = kwargs.get("inputs_embeds") if rows is None else rows
    return rows.shape[1] if isinstance(rows, Tensor) else None


def check_growth(model: Any, before: list[int], after: list[int], columns: int | None) -> None:
    """Raises InputError unless every layer of the cache has grown from `before` to
    `after` by `columns`; None: by as many as the one that grew most."""
    family = family_of(model.config)
    # A draft by early exit runs the first layers alone, as many as its configuration
    # says.
    blocks = list(family.blocks(model))[: model.config.num_hidden_layers]
    numbers = [
        getattr(getattr(block, family.attention_name, None), "layer_idx", None) for block in blocks
    ]
    if None not in numbers and numbers != list(range(len(numbers))):
        raise InputError(
            f"the layers are numbered {numbers}, and a cache counts them from 0: after taking "
            "layers out of a model, set the layer_idx of each layer's attention again"
        )
    grown = {
        number: held(after, number) - held(before, number)
        for number in numbers
        if number is not None
    }
    # At least 1: where no layer has grown, none has used the cache.
    due = (max(grown.values(), default=0) or 1) if columns is None else columns
    for number, count in grown.items():
        if count != due:
            raise lost(
                f"the cache of layer {number} took in {count} of the call's {due} columns", model
            )


def held(lengths: list[int], number: int) -> int:
    """The columns of layer `number` among those of all; 0 for a layer that does not
    exist yet."""
    return lengths[number] if number < len(lengths) else 0


def checkpoint_blocks(model: PreTrainedModel) -> None:
    """Keep only each layer's input for the backward pass, and compute the rest again
    there."""
    # 5.20 has only the older name.
    newer = hasattr(model, "activation_checkpointing_enable")
    enable = model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


# Versions of transformers that were not tested: a tiny model shows whether they decode
# correctly.

TOLERANCE = 1e-5
"""Largest difference of a logit, in units of the larger of 1 and the largest logit."""
TINY = {
    "num_kv_heads": 1,
    "kv_lora_rank": 4,
    "chunk_size": 2,
    "top_k": 100,
    "session_stride": 2,
    "session_slots": 2,
}
"""Options with which every memory is used within a few tokens."""
checked_classes: set[type] = set()
"""Classes of models that need no check any more."""


def check_version(model_class: Any) -> None:
    """Check, once per class of models, that a version of transformers that was not
    tested decodes correctly.

    Raises InputError if it does not. Random numbers, default dtype and default device
    are not changed.
    """
    version = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    if OLDEST <= version <= NEWEST or model_class in checked_classes:
        return
    # Added before, because the check builds such models, which would be checked in
    # turn.
    checked_classes.add(model_class)
    # The user's defaults must neither decide the check nor be changed by it.
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with (
            torch.device("cpu"),
            torch.random.fork_rng(devices=[]),
            torch.no_grad(),
            torch.autocast("cpu", enabled=False),
        ):
            weight = nn.Linear(1, 1).weight
            # A caller's context builds models without data: the check is left to the
            # next model.
            if weight.is_meta or not weight.numel():
                checked_classes.discard(model_class)
                return
            for kind in ATTENTION_TYPES:
                known = options_of(kind)
                check_decoding(
                    model_class, kind, {name: TINY[name] for name in TINY if name in known}
                )
    except BaseException:
        checked_classes.discard(model_class)
        raise
    finally:
        torch.set_default_dtype(dtype)


def check_decoding(model_class: Any, kind: str, options: dict[str, Any]) -> None:
    """Raises InputError if two cached calls of a tiny model, padded or not, differ from
    one."""
    try:
        error = difference(model_class, kind, {"local_window": 3} | options)
    # An unknown version can fail in any way.
    except Exception as problem:
        cause = str(problem).partition("\n")[0]
        raise InputError(
            f"{kind} does not decode: {type(problem).__name__}: {cause}; {installed()}"
        ) from problem
    # Written so that NaN is refused too.
    if not error <= TOLERANCE:
        raise InputError(
            f"two cached calls of {kind} differ from one call by {error:.1e}; {installed()}"
        )


def difference(model_class: Any, kind: str, options: dict[str, Any]) -> float:
    """The largest difference of a logit between two cached calls and one, in units of
    the larger of 1 and the largest logit."""
    kind_of = model_class.config_class
    sizes = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_attention_heads": 2,
        "head_dim": 4,
        "vocab_size": 11,
    }
    sizes |= {"num_hidden_layers": 2, "num_key_value_heads": 2}
    if FAMILIES[kind_of.model_type.removeprefix(PREFIX)].windowed == "by layer":
        sizes |= {"layer_types": [SLIDING, FULL], "sliding_window": 3, "use_sliding_window": True}
    config = kind_of(**sizes, attention_type=kind, attention_options=options)
    model, generator = model_class(config).eval(), torch.Generator().manual_seed(0)
    # All weights random: with initial ones the router and gates would hide most of the
    # memories.
    for parameter in model.parameters():
        parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    ids = torch.randint(11, (2, 9), generator=generator)
    whole, error = model(ids, use_cache=False).logits, 0.0
    # With padding too: it shows whether masks and positions arrive.
    for padding in (0, 2):
        rows = nn.functional.pad(ids, (padding, 0))
        mask = (torch.arange(rows.shape[1]) >= padding).long().expand_as(rows)
        places, cache = (mask.cumsum(1) - 1).clamp(min=0), None
        for start, stop in ((0, 5), (5, rows.shape[1])):
            more = (
                {"attention_mask": mask[:, :stop], "position_ids": places[:, start:stop]}
                if padding
                else {}
            )
            output = model(rows[:, start:stop], use_cache=True, **{CACHE_ARGUMENT: cache}, **more)
            cache, first = cache_of(output), max(0, padding - start)
            wanted = whole[:, start + first - padding : stop - padding]
            error = max(error, float((output.logits[:, first:] - wanted).abs().max()))
    return error / max(1.0, float(whole.abs().max()))
