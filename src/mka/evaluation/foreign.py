"""Any PyTorch attention module as one function of its input: found by name, built and called by its own signature.

y = module(x)                         y: (B, T, C), or a tuple that begins with it
y = module(x, <mask>=...)             valid or attention_mask (true: a token), key_padding_mask (true: padding)
y, state = module(x, state=state)     starting from module.initial_state(B): it decodes with a state of its own
y, ... = module(x, <cache>=cache)     a cache of transformers, which it fills: token by token, as without a mask
                                            only one token knows which keys come before it
"""

import importlib
import inspect
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from mka.limits import InputError
from mka.models import cache_parameter

HIDDEN_SIZE_NAMES = ("hidden_size", "embed_dim", "d_model", "dim", "n_embd", "embedding_dim")
NUM_HEADS_NAMES = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
MASKS = {"valid": True, "attention_mask": True, "key_padding_mask": False}
"""Names of padding masks, and what stands in them at a token."""
CACHES = ("past_key_values", "past_key_value")
"""Names of a cache of transformers, where no annotation says which it is."""
POSITION_NAMES = ("positions", "position_ids")


@dataclass(frozen=True)
class ForeignModule:
    """A module, its input's size, and what its forward is called with beside x.

    Raises InputError where forward needs something that is not known.
    """

    module: nn.Module
    hidden_size: int
    call: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, parameter in self.parameters().items():
            required = parameter.default is parameter.empty and name not in self.call
            if required and name not in ("key", "value", *MASKS, *POSITION_NAMES):
                shown = type(self.module).__name__
                raise InputError(f"forward of {shown} needs {name!r}; give it by --call {name}=VALUE")

    def parameters(self) -> dict[str, inspect.Parameter]:
        """Those of forward that can be given by name, without the first, which is x."""
        named = [
            parameter
            for parameter in inspect.signature(self.module.forward).parameters.values()
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        return {parameter.name: parameter for parameter in named[1:]}

    @property
    def mask(self) -> str | None:
        """The name of its padding mask."""
        return next((name for name in MASKS if name in self.parameters() and name not in self.call), None)

    @property
    def cache(self) -> str | None:
        """The name of what it decodes with; None: it does not."""
        names = self.parameters()
        if "state" in names and hasattr(self.module, "initial_state"):
            return "state"
        known = (cache_parameter(self.module.forward), *CACHES)
        return next((name for name in known if name in names and name not in self.call), None)

    @property
    def pieces(self) -> tuple[int, ...]:
        """Tokens of a call in which it decodes."""
        return (1, 3) if self.cache == "state" else (1,)

    def initial_state(self, rows: int) -> Any:
        if self.cache != "state":
            return DynamicCache()
        make: Any = self.module.initial_state
        return make(rows)

    def __call__(self, x: Tensor, valid: Tensor | None = None, **more: Any) -> Tensor:
        """(B, T, C) -> (B, T, C). Raises InputError where the module fails or gives something else."""
        return self.with_state(x, valid, **more)[0]

    def decode(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """The next tokens after those of `state`: their y, and the state to go on with."""
        y, after = self.with_state(x, **{str(self.cache): state})
        return y, after if self.cache == "state" else state

    def with_state(self, x: Tensor, valid: Tensor | None = None, **more: Any) -> tuple[Tensor, Any]:
        given, names = {**self.call, **more}, self.parameters()
        given |= {name: x for name in ("key", "value") if name in names and name not in given}
        if self.mask and (valid is not None or names[self.mask].default is inspect.Parameter.empty):
            kept = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if valid is None else valid
            given[self.mask] = kept if MASKS[self.mask] else ~kept
        for name in POSITION_NAMES:
            if name in names and names[name].default is inspect.Parameter.empty and name not in given:
                given[name] = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        shown = type(self.module).__name__
        try:
            answer = self.module(x, **given)
        except Exception as error:  # it is somebody else's code
            raise InputError(f"forward of {shown} failed: {type(error).__name__}: {error}") from error
        y, state = (answer[0], answer[1] if len(answer) > 1 else None) if isinstance(answer, tuple) else (answer, None)
        if not isinstance(y, Tensor) or y.shape != x.shape:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise InputError(f"forward of {shown} gives {got} for an input of {tuple(x.shape)}; it must keep the shape")
        return y, state


def build_foreign(
    target: str,
    hidden_size: int,
    num_heads: int | None,
    options: Sequence[str],
    call: Sequence[str],
    seed: int,
    dtype: torch.dtype,
) -> ForeignModule:
    """`package.module:Class` (or a function that makes a module), built with seeded weights, in evaluation mode."""
    make, chosen = found(target), settings("options", options)
    names = inspect.signature(make).parameters
    name_of(HIDDEN_SIZE_NAMES, names, chosen, hidden_size)
    if num_heads is not None and not name_of(NUM_HEADS_NAMES, names, chosen, num_heads):
        raise InputError(f"num_heads is {num_heads}; {target} takes none of {', '.join(NUM_HEADS_NAMES)}")
    torch.manual_seed(seed)
    try:
        module = make(**chosen)
    except Exception as error:  # it is somebody else's code
        raise InputError(
            f"{target} cannot be built with {chosen}: {type(error).__name__}: {error}; give what it needs by "
            "--options NAME=VALUE"
        ) from error
    if not isinstance(module, nn.Module):
        raise InputError(f"{target} makes a {type(module).__name__}; it must be a torch.nn.Module")
    return ForeignModule(module.to(dtype).eval(), hidden_size, settings("call", call))


def name_of(known: Sequence[str], names: Mapping[str, Any], chosen: dict[str, Any], value: int) -> bool:
    """Give the value under the first of the known names that is there, unless one was chosen."""
    name = next((name for name in known if name in names), None)
    if name is not None:
        chosen.setdefault(name, value)
    return name is not None


def found(target: str) -> Callable[..., Any]:
    """The class or function of that name; modules in the current folder are found too."""
    place, _, name = target.partition(":")
    if not place or not name:
        raise InputError(f"module is {target!r}; give package.module:Class")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        there = importlib.import_module(place)
    except Exception as error:  # it is somebody else's code
        raise InputError(f"module is {target!r}; {place} cannot be imported: {error}") from error
    if not callable(getattr(there, name, None)):
        raise InputError(f"module is {target!r}; {place} has no class or function {name!r}")
    return getattr(there, name)


def settings(flag: str, given: Sequence[str]) -> dict[str, Any]:
    """NAME=VALUE, the value as JSON or else as text."""
    chosen = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"{flag} holds {text!r}; give NAME=VALUE")
        try:
            chosen[name] = json.loads(value)
        except ValueError:
            chosen[name] = value
    return chosen
