"""All that differs between transformers' versions, and the checks that none of it goes wrong without a word.

The cache is recognised by its class, whatever a version calls it on its way: through `forward` and `generate` of a
model (`with_cache`, which also sees that every block has used it), and down to the blocks (`cache_among`).
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

from mka.limits import InputError
from mka.models.cache import StateLayer
from mka.models.families import FAMILIES, FULL, PREFIX, SLIDING, family_of
from mka.ops.packing import documents_of

OLDEST, NEWEST = (5, 20), (5, 24)
"""The versions of transformers that were tried: these and those between, as in pyproject.toml."""
CACHE_NAMES = ("cache", "past_key_values")
"""What the tried versions call the cache: up to 5.23 the second."""


def installed() -> str:
    oldest, newest = (".".join(map(str, version)) for version in (OLDEST, NEWEST))
    return f"transformers {transformers.__version__} is installed; tried were {oldest} to {newest}"


# ---- the cache on its way


def cache_parameter(function: Callable[..., Any]) -> str | None:
    """The name under which a function takes a cache of transformers, by its annotation."""
    for name, parameter in inspect.signature(function).parameters.items():
        kinds = (parameter.annotation, *get_args(parameter.annotation))
        if any(isinstance(kind, type) and issubclass(kind, Cache) for kind in kinds):
            return name
    return None


CACHE_ARGUMENT = cache_parameter(LlamaForCausalLM.forward) or CACHE_NAMES[0]
"""What the installed version calls the cache. Models of mka take it under any name."""


def cache_among(values: Iterable[Any]) -> Cache | None:
    """The cache among the arguments, or the outputs, of a call. Raises InputError for two."""
    found: Cache | None = None
    for value in values:
        if isinstance(value, Cache):
            if found is not None and found is not value:
                raise InputError(f"a call was given two caches, where one is allowed; {installed()}")
            found = value
    return found


def cache_of(output: Any) -> Cache | None:
    """The cache that a model or `generate` returned."""
    return cache_among(output if isinstance(output, tuple) else output.values())


def renamed(arguments: dict[str, Any], name: str) -> dict[str, Any]:
    """The same arguments, the cache among them under `name`. Raises InputError for one of another kind."""
    cache = cache_among(arguments.values())
    for key in CACHE_NAMES:
        if not isinstance(arguments.get(key), Cache | None):
            kind = type(arguments[key]).__name__
            raise InputError(
                f"{key} is a {kind}; allowed: a Cache of transformers, such as memory_cache makes, or None"
            )
    others = {
        key: value
        for key, value in arguments.items()
        if not isinstance(value, Cache) and (value is not None or key not in CACHE_NAMES)
    }
    return others if cache is None else others | {name: cache}


def lost(what: str, module: nn.Module) -> InputError:
    advice = "; gradient checkpointing leaves the cache out: use model.eval(), or use_cache=False and no cache"
    return InputError(f"{what}, so its result would be wrong; {installed()}{advice if module.training else ''}")


def cache_for_block(attention: nn.Module, number: int, arguments: dict[str, Any]) -> Cache | None:
    """The cache among what a block hands to its attention. Raises InputError where one is asked for and there is none.

    arguments: all but hidden states, mask and positions, by whatever names the version has for them.
    """
    cache = cache_among(arguments.values())
    if cache is None and arguments.get("use_cache"):
        raise lost(f"block {number} was to use a cache and was given none", attention)
    return cache


def lengths(cache: Cache | None) -> list[int]:
    """Columns that each layer of the cache holds."""
    layers = getattr(cache, "layers", ())
    return [layer.get_seq_length() if isinstance(layer, StateLayer) else 0 for layer in layers]


def with_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A model's forward that takes the cache under any name, and makes sure that every block has used it.

    The cache that goes in, or that comes out where none went in, has grown by the call's columns in each block that
    ran, else it raises InputError.
    """
    name = cache_parameter(forward) or CACHE_ARGUMENT
    check: Any = torch.compiler.disable(check_use)

    @wraps(forward)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = renamed(kwargs, name)
        given = cache_among((*args, *kwargs.values()))
        kwargs = with_documents(kwargs, given)
        before = lengths(given)
        output = forward(self, *args, **kwargs)
        if given is not None or kwargs.get("use_cache") is not False:
            check(self, given, before, output, columns_of(args, kwargs), bool(kwargs.get("use_cache")))
        return output

    return checked


PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""By what transformers tells flash attention where documents end that are packed in one row."""


def with_documents(arguments: dict[str, Any], cache: Cache | None) -> dict[str, Any]:
    """The arguments of a call with documents told apart by positions alone, without a cache where there are several.

    Raises InputError for documents that cannot be told apart, and for several in a row that are to go into a cache.
    """
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
    if torch.compiler.is_compiling():
        rises = (positions.diff(dim=1) > 0) if valid is None else (positions.diff(dim=1) > 0) | ~valid[:, :-1]
        check: Any = torch._assert_async  # pyright: ignore[reportPrivateImportUsage]
        check((rises if valid is None else rises | ~valid[:, 1:]).all(), COMPILED)
        return others
    if documents_of(positions, valid) is None:
        return others
    if cache is not None or others.get("use_cache"):
        raise InputError(
            "position_ids start again within a row: several documents are packed in it, and a cache goes on with one; "
            "give them as rows of their own, or use_cache=False and no cache"
        )
    return others | {"use_cache": False}


COMPILED = "documents are packed in one row, by position_ids that start again; a compiled model cannot keep them apart"


def positions_of(ends: Tensor, arguments: dict[str, Any]) -> Tensor:
    """(1, T): positions that start again where the documents of the one row end, `ends` (documents + 1,) from 0 on.

    Raises InputError where they do not fit the row, or the positions that were given beside them.
    """
    given, columns = arguments.get("position_ids"), columns_of((), arguments)
    rows = next((arguments[name] for name in ("input_ids", "inputs_embeds") if arguments.get(name) is not None), None)
    count = len(rows) if rows is not None else 1
    last, sizes = int(ends[-1]), ends.diff()
    if count != 1 or int(ends[0]) != 0 or bool((sizes <= 0).any()) or (columns is not None and last != columns):
        raise InputError(
            f"cu_seq_lens_q is {ends.tolist()}; it must rise from 0 to the tokens of one row, which are {columns} in "
            f"{count} {'row' if count == 1 else 'rows'}"
        )
    positions = torch.arange(last, device=ends.device) - ends[:-1].repeat_interleave(sizes)
    if isinstance(given, Tensor) and not torch.equal(given.flatten().to(positions), positions):
        raise InputError("cu_seq_lens_q and position_ids tell documents apart in different places; give one of them")
    return positions[None]


def check_use(
    model: Any, given: Cache | None, before: list[int], output: Any, columns: int | None, asked: bool
) -> None:
    """Raises InputError unless the cache that went in, or else the one that came out, has grown in every block."""
    used = cache_of(output) if given is None else given
    if used is not None:
        check_growth(model, before, lengths(used), columns)
    elif asked and not (model.training and any(blocks_with_checkpoints(model))):
        raise lost("use_cache is True and no cache was made", model)


def blocks_with_checkpoints(model: Any) -> Iterator[bool]:
    return (getattr(block, "gradient_checkpointing", False) for block in family_of(model.config).blocks(model))


def columns_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Columns of a model's call, from its first argument or by name; None: not given in either way."""
    rows = args[0] if args and args[0] is not None else kwargs.get("input_ids")
    rows = kwargs.get("inputs_embeds") if rows is None else rows
    return rows.shape[1] if isinstance(rows, Tensor) else None


def check_growth(model: Any, before: list[int], after: list[int], columns: int | None) -> None:
    """Raises InputError unless every block's layer has grown by `columns`; None: by as many as any of them."""
    family = family_of(model.config)
    blocks = list(family.blocks(model))[: model.config.num_hidden_layers]  # a draft of early exit runs the first alone
    numbers = [getattr(getattr(block, family.attention_name, None), "layer_idx", None) for block in blocks]
    if None not in numbers and numbers != list(range(len(numbers))):
        raise InputError(
            f"the blocks are numbered {numbers}, and a cache counts them from 0: after taking blocks out of a model, "
            "set the layer_idx of each block's attention anew"
        )
    grown = {number: held(after, number) - held(before, number) for number in numbers if number is not None}
    due = (max(grown.values(), default=0) or 1) if columns is None else columns
    for number, count in grown.items():
        if count != due:
            raise lost(f"the cache of block {number} took in {count} of the call's {due} columns", model)


def held(lengths: list[int], number: int) -> int:
    return lengths[number] if number < len(lengths) else 0


def checkpoint_blocks(model: PreTrainedModel) -> None:
    """Keep only each block's input for the backward pass, and compute the rest again."""
    newer = hasattr(model, "activation_checkpointing_enable")  # 5.20 has only the older name
    enable = model.activation_checkpointing_enable if newer else model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


# ---- versions that were not tried

TOLERANCE = 1e-5
SELF_CHECKS: dict[str, dict[str, Any]] = {
    "gqa": {"num_kv_heads": 1},
    "mla": {"kv_lora_rank": 4},
    "mka": {"num_kv_heads": 1, "chunk_size": 2, "top_k": 100, "session_stride": 2, "session_slots": 2},
    "fmka": {"num_kv_heads": 1, "chunk_size": 2, "top_k": 100},
}
"""A mechanism of each kind of cache, with options that let every memory serve within a few tokens."""
checked_classes: set[type] = set()


def check_version(model_class: Any) -> None:
    """For a version of transformers that was not tried, once for each class of models: does it decode correctly?

    Raises InputError if not. Random numbers, default dtype and default device stay as they are.
    """
    version = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    if OLDEST <= version <= NEWEST or model_class in checked_classes:
        return
    checked_classes.add(model_class)  # before, because the check builds such models
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
            if weight.is_meta or not weight.numel():  # a caller's context keeps weights away: left to the next model
                checked_classes.discard(model_class)
                return
            for kind, options in SELF_CHECKS.items():
                check_decoding(model_class, kind, options)
    except BaseException:
        checked_classes.discard(model_class)
        raise
    finally:
        torch.set_default_dtype(dtype)


def check_decoding(model_class: Any, kind: str, options: dict[str, Any]) -> None:
    """Raises InputError where two cached calls of a tiny model, padded or not, are not one call."""
    try:
        error = difference(model_class, kind, {"local_window": 3} | options)
    except Exception as problem:  # whatever an unknown version does
        cause = str(problem).partition("\n")[0]
        raise InputError(f"{kind} does not decode: {type(problem).__name__}: {cause}; {installed()}") from problem
    if not error <= TOLERANCE:
        raise InputError(f"two cached calls of {kind} differ from one call by {error:.1e}; {installed()}")


def difference(model_class: Any, kind: str, options: dict[str, Any]) -> float:
    """The largest difference of a logit between two calls and one, in units of the larger of 1 and the largest."""
    kind_of = model_class.config_class
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "head_dim": 4, "vocab_size": 11}
    sizes |= {"num_hidden_layers": 2, "num_key_value_heads": 2}
    if FAMILIES[kind_of.model_type.removeprefix(PREFIX)].windowed == "by layer":
        sizes |= {"layer_types": [SLIDING, FULL], "sliding_window": 3, "use_sliding_window": True}
    config = kind_of(**sizes, attention_type=kind, attention_options=options)
    model, generator = model_class(config).eval(), torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(0.5 * torch.randn(parameter.shape, generator=generator))
    ids = torch.randint(11, (2, 9), generator=generator)
    whole, error = model(ids, use_cache=False).logits, 0.0
    for padding in (0, 2):
        rows = nn.functional.pad(ids, (padding, 0))
        mask = (torch.arange(rows.shape[1]) >= padding).long().expand_as(rows)
        places, cache = (mask.cumsum(1) - 1).clamp(min=0), None
        for start, stop in ((0, 5), (5, rows.shape[1])):
            more = {"attention_mask": mask[:, :stop], "position_ids": places[:, start:stop]} if padding else {}
            output = model(rows[:, start:stop], use_cache=True, **{CACHE_ARGUMENT: cache}, **more)
            cache, first = cache_of(output), max(0, padding - start)
            wanted = whole[:, start + first - padding : stop - padding]
            error = max(error, float((output.logits[:, first:] - wanted).abs().max()))
    return error / max(1.0, float(whole.abs().max()))
