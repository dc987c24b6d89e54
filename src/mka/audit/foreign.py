"""Any PyTorch attention module as one function of its input: found by name, built and
called by its own signature.

y = module(x)                        y: (B, T, C), or a tuple that begins with it
y = module(x, <mask>=...)            valid or attention_mask (True: a token), or
                                     key_padding_mask (True: padding)
y, state = module(x, state=state)    decodes with a state of its own, from
                                     module.initial_state(B)
y, ... = module(x, <cache>=cache)    decodes with a cache of transformers, which it
                                     fills; one token at a time, since without a mask it
                                     could not tell which keys come before several
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

from mka.errors import InputError
from mka.models import cache_parameter

HIDDEN_SIZE_NAMES = ("hidden_size", "embed_dim", "d_model", "dim", "n_embd", "embedding_dim")
"""Names of a constructor's argument for the width, in the order in which they are
looked for."""
NUM_HEADS_NAMES = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")
"""The same for the number of heads."""
MASKS = {"valid": True, "attention_mask": True, "key_padding_mask": False}
"""Names of padding masks, and the value that each has at a token."""
CACHES = ("past_key_values", "past_key_value")
"""Names of a cache of transformers, used if no annotation tells which argument it
is."""
POSITION_NAMES = ("positions", "position_ids")
"""Names of positions, which are given if forward needs them."""


@dataclass(frozen=True)
class ForeignModule:
    """A module as a function of x.

    Args:
        module: the module.
        hidden_size: C, channels of x.
        call: arguments of its forward in addition to x, by name. Default: none.

    Raises InputError if forward needs an argument that is neither given nor known here.
    """

    module: nn.Module
    hidden_size: int
    call: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, parameter in self.parameters().items():
            # Those that `with_state` gives by itself are not asked for.
            required = parameter.default is parameter.empty and name not in self.call
            if required and name not in ("key", "value", *MASKS, *POSITION_NAMES):
                shown = type(self.module).__name__
                raise InputError(
                    f"forward of {shown} needs {name!r}; give it by --call {name}=VALUE"
                )

    def parameters(self) -> dict[str, inspect.Parameter]:
        """The parameters of forward that can be given by name, except the first, which
        is x."""
        named = [
            parameter
            for parameter in inspect.signature(self.module.forward).parameters.values()
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        return {parameter.name: parameter for parameter in named[1:]}

    @property
    def mask(self) -> str | None:
        """The name of its padding mask; None if it takes none, or if `call` gives
        it."""
        return next(
            (name for name in MASKS if name in self.parameters() and name not in self.call), None
        )

    @property
    def cache(self) -> str | None:
        """The name of the state or cache that it decodes with; None if it cannot
        decode."""
        names = self.parameters()
        if "state" in names and hasattr(self.module, "initial_state"):
            return "state"
        known = (cache_parameter(self.module.forward), *CACHES)
        return next((name for name in known if name in names and name not in self.call), None)

    @property
    def pieces(self) -> tuple[int, ...]:
        """The numbers of tokens per call in which its decoding is tested."""
        # Without a mask, a cache of transformers cannot tell the order of several new
        # keys.
        return (1, 3) if self.cache == "state" else (1,)

    def initial_state(self, rows: int) -> Any:
        """The empty state or cache, for that many rows, that it decodes with."""
        if self.cache != "state":
            return DynamicCache()
        make: Any = self.module.initial_state
        return make(rows)

    def __call__(self, x: Tensor, valid: Tensor | None = None, **more: Any) -> Tensor:
        """x (B, T, C) -> y (B, T, C).

        Args:
            x: (B, T, C).
            valid: (B, T) bool, False for padding. Default: None, all valid.
            more: further arguments of forward.

        Raises InputError if the module fails or returns something else.
        """
        return self.with_state(x, valid, **more)[0]

    def decode(self, x: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Read the next tokens x (B, T, C) after those of `state`: returns y, and the
        state to continue with. Raises InputError if the module fails."""
        # A cache of transformers is filled in place, so the same one is passed on.
        y, after = self.with_state(x, **{str(self.cache): state})
        return y, after if self.cache == "state" else state

    def with_state(self, x: Tensor, valid: Tensor | None = None, **more: Any) -> tuple[Tensor, Any]:
        """One call: returns y, and the second value of forward, None if there is none.

        Masks, positions, key and value are given by name. Raises InputError if the
        module fails.
        """
        given, names = {**self.call, **more}, self.parameters()
        # Self-attention: modules such as nn.MultiheadAttention take x as key and value
        # too.
        given |= {name: x for name in ("key", "value") if name in names and name not in given}
        if self.mask and (valid is not None or names[self.mask].default is inspect.Parameter.empty):
            kept = (
                torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
                if valid is None
                else valid
            )
            given[self.mask] = kept if MASKS[self.mask] else ~kept
        # Only if forward needs them: the module's own default is part of what is
        # tested.
        for name in POSITION_NAMES:
            if (
                name in names
                and names[name].default is inspect.Parameter.empty
                and name not in given
            ):
                given[name] = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        shown = type(self.module).__name__
        try:
            answer = self.module(x, **given)
        # Foreign code can fail in any way.
        except Exception as error:
            raise InputError(
                f"forward of {shown} failed: {type(error).__name__}: {error}"
            ) from error
        parts = answer if isinstance(answer, tuple) else (answer,)
        y, state = parts[0], parts[1] if len(parts) > 1 else None
        if not isinstance(y, Tensor) or y.shape != x.shape:
            got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise InputError(
                f"forward of {shown} gives {got} for an input of {tuple(x.shape)}; it must "
                "keep the shape"
            )
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
    """Import a module's class, and build it with seeded weights, in evaluation mode.

    Args:
        target: `package.module:Class`, or a function in its place that returns a
            module.
        hidden_size: C, given under one of the names in HIDDEN_SIZE_NAMES.
        num_heads: H, given under one of the names in NUM_HEADS_NAMES. None: not given.
        options: further arguments of the class, NAME=VALUE each.
        call: arguments of its forward, NAME=VALUE each.
        seed: random seed for the weights.
        dtype: of the weights.

    Raises InputError if it cannot be imported, built or called with these arguments.
    """
    make, chosen = found(target), settings("options", options)
    names = inspect.signature(make).parameters
    name_of(HIDDEN_SIZE_NAMES, names, chosen, hidden_size)
    if num_heads is not None and not name_of(NUM_HEADS_NAMES, names, chosen, num_heads):
        raise InputError(
            f"num_heads is {num_heads}; {target} takes none of {', '.join(NUM_HEADS_NAMES)}"
        )
    # Weights are drawn when the module is made.
    torch.manual_seed(seed)
    try:
        module = make(**chosen)
    # Foreign code can fail in any way.
    except Exception as error:
        given = f"with {chosen}" if chosen else "without arguments"
        raise InputError(
            f"{target} cannot be built {given}: {type(error).__name__}: {error}; give "
            "what it needs by --options NAME=VALUE"
        ) from error
    if not isinstance(module, nn.Module):
        raise InputError(f"{target} makes a {type(module).__name__}; it must be a torch.nn.Module")
    return ForeignModule(module.to(dtype).eval(), hidden_size, settings("call", call))


def name_of(
    known: Sequence[str], names: Mapping[str, Any], chosen: dict[str, Any], value: int
) -> bool:
    """Add `value` to `chosen` under the first of the known names among `names`, unless
    it has one.

    Returns whether there is such a name.
    """
    name = next((name for name in known if name in names), None)
    if name is not None:
        chosen.setdefault(name, value)
    return name is not None


def found(target: str) -> Callable[..., Any]:
    """The class or function "package.module:name". Raises InputError if there is
    none."""
    place, _, name = target.partition(":")
    if not place or not name:
        raise InputError(f"module is {target!r}; give package.module:Class")
    # An installed command does not have the current folder on its path, unlike `python
    # -m`.
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        there = importlib.import_module(place)
    # Foreign code can fail in any way, even while it is imported.
    except Exception as error:
        raise InputError(f"module is {target!r}; {place} cannot be imported: {error}") from error
    if not callable(getattr(there, name, None)):
        raise InputError(f"module is {target!r}; {place} has no class or function {name!r}")
    return getattr(there, name)


def settings(flag: str, given: Sequence[str]) -> dict[str, Any]:
    """A list of NAME=VALUE as a dict, each value read as JSON, or else as text.

    Raises InputError, naming the flag, for anything else than NAME=VALUE.
    """
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
