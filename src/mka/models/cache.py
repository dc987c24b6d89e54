"""A mechanism's state as a layer of transformers' cache.

transformers counts columns, padding included; a state counts each row's tokens. The
layer keeps both, so that `crop` can tell how many tokens of a row the last columns
held.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from mka.attention import CausalAttention
from mka.errors import InputError, check_whole
from mka.memory.bank import Bank
from mka.memory.options import LongTermConfig
from mka.memory.places import LongTerm
from mka.memory.state import State, StateForm

REVERSIBLE = 64
"""How many of the latest tokens can be taken back, unless a draft is longer
(mka.models.drafts)."""
asked_for: ContextVar[int] = ContextVar("reversible", default=REVERSIBLE)
"""The `reversible` of layers that are made without one."""


@contextmanager
def taking_back(reversible: int) -> Iterator[None]:
    """Within the block, caches are made that can take back this many tokens per row."""
    token = asked_for.set(reversible)
    try:
        yield
    finally:
        asked_for.reset(token)


class StateLayer(CacheLayerMixin):
    """One layer of a cache: a state, and which columns of each call were tokens.

    Args:
        reversible: how many of its latest tokens a row can take back (`crop`). Default:
            None, 64, or in `generate` as many as the longest draft has.
        form: the form of its state. Default: None, what the mechanism's `initial_state`
            makes.
    """

    # What transformers asks of a cache's layers. There are no keys to make before the
    # first call.
    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, reversible: int | None = None, form: StateForm | None = None) -> None:
        super().__init__()
        self.reversible = asked_for.get() if reversible is None else reversible
        self.form = form
        self.state: State | None = None
        self.calls: list[tuple[int, Tensor | None]] = []
        self.device = torch.device("cpu")

    def attend(
        self, attention: CausalAttention, x: Tensor, positions: Tensor | None, valid: Tensor | None
    ) -> Tensor:
        """Let the mechanism read the next columns: x (B, T, C) -> y (B, T, C).

        Args:
            attention: the mechanism of this layer.
            x: (B, T, C).
            positions: (B or 1, T). None: valid tokens counted from 0.
            valid: (B, T) bool, False for padding. None: all are tokens.

        Raises ValueError as `CausalAttention.forward` does.
        """
        if self.state is None and not self.open(x):
            self.keep(
                attention.initial_state(x.shape[0], x.dtype, x.device, reversible=self.reversible)
            )
        y, self.state = attention(x, positions=positions, valid=valid, state=self.state)
        # Calls without padding are counted together, or decoding would make the list
        # ever longer.
        if valid is None and self.calls and self.calls[-1][1] is None:
            self.calls[-1] = (self.calls[-1][0] + x.shape[1], None)
        else:
            self.calls.append((x.shape[1], valid))
        return y

    def open(self, x: Tensor) -> bool:
        """Make the state for the rows of x (B, T, C) if that is possible without asking
        the mechanism; returns whether it is."""
        if self.form is not None:
            # The form of a model that was built without data has no device of its own.
            device = x.device if self.form.device.type == "meta" else self.form.device
            self.keep(self.form.make(x.shape[0], device, self.reversible))
        return self.form is not None

    def keep(self, state: State) -> None:
        """Use this state from now on."""
        self.state, self.device, self.is_initialized = state, state.device, True

    def reserve(self, x: Tensor, counts: Sequence[int]) -> None:
        """Make room for the next call, x (B, T, C) with `counts` (B,) tokens. Raises
        ValueError if there is no room."""
        if self.state is None:
            self.open(x)
        if self.state is not None:
            self.state.reserve(counts)

    def get_seq_length(self) -> int:
        """How many columns it has seen, padding included."""
        return sum(columns for columns, _ in self.calls)

    def valid_columns(self) -> Tensor | None:
        """(B, columns seen) bool, False for padding; None if there was none."""
        if self.state is None or all(valid is None for _, valid in self.calls):
            return None
        rows = self.state.batch_size
        calls = [
            torch.ones(rows, count, dtype=torch.bool, device=self.device)
            if valid is None
            else valid.to(self.device)
            for count, valid in self.calls
        ]
        return torch.cat(calls, dim=1)

    def check_past(self, past: Tensor) -> None:
        """Raises InputError unless `past` (B, S) marks the same columns as padding as
        when they were read."""
        # A memory has averaged and summarized what it read, and cannot leave it out
        # afterward.
        seen, columns = self.valid_columns(), self.get_seq_length()
        if past.shape[1] != columns:
            raise InputError(
                f"attention_mask has {past.shape[1]} columns before this call's; the cache "
                f"holds {columns}"
            )
        seen = torch.ones_like(past) if seen is None else seen.to(past.device)
        if not torch.equal(past, seen):
            row, column = (past != seen).nonzero()[0].tolist()
            is_now, was = ("a token", "padding") if past[row, column] else ("padding", "a token")
            raise InputError(
                f"attention_mask says that column {column} of row {row} is {is_now}; it was read "
                f"as {was}, and a memory cannot take that back: give each call the mask that the "
                "cache was filled with (generate makes one from pad_token_id if none is given), "
                "or start a new cache"
            )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """The width of a mask for the next call of `query_length` columns, and its
        offset, 0."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """The largest number of columns; -1, there is no limit."""
        return -1

    @property
    def is_bounded(self) -> bool:
        """Whether it holds only the latest tokens, as far as that is known: before the
        first token, of a layer with a form alone."""
        known = self.form or self.state
        return known is not None and any(
            entry.latest is not None for entry in known.entries.values()
        )

    @property
    def batch_size(self) -> int:
        """B, the number of rows. Raises AttributeError before the first token."""
        # AttributeError, as for transformers' own layers before their first keys.
        if self.state is None:
            raise AttributeError("batch_size is known once the layer has seen a token")
        return self.state.batch_size

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last columns.

        tokens_to_remove: if negative, minus how many columns; if positive, how many are
            to be left.

        Raises ValueError if this is further back than the state allows; it names the
        limit.
        """
        length = self.get_seq_length()
        left = length + tokens_to_remove if tokens_to_remove <= 0 else min(length, tokens_to_remove)
        if self.state is None or left == length:
            return
        # Columns are counted once for all rows, tokens per row: padding among the
        # columns that go takes no token with it.
        kept, removed, columns = [], torch.zeros(self.state.batch_size, dtype=torch.long), 0
        for count, valid in self.calls:
            stay = max(0, min(count, left - columns))
            removed += count - stay if valid is None else valid[:, stay:].sum(1).cpu()
            if stay:
                kept.append((stay, None if valid is None else valid[:, :stay]))
            columns += count
        self.state = self.state.crop(self.state.num_tokens - removed)
        self.calls = kept

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.calls, self.is_initialized = None, [], False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows in the order of beams; beam_idx (B,)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows of these indices (N,), in this order."""
        if self.state is not None:
            self.state = self.state.select(indices)
            self.calls = [
                (count, None if valid is None else valid[indices.to(valid.device)])
                for count, valid in self.calls
            ]

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row `repeats` times, copies next to each other."""
        if self.state is not None:
            self.batch_select_indices(
                torch.arange(self.state.batch_size).repeat_interleave(repeats)
            )

    def offload(self) -> None:
        """Move the state to the CPU until it is needed."""
        if self.state is not None:
            self.state = self.state.to("cpu")

    def prefetch(self) -> None:
        """Move the state back to its device."""
        if self.state is not None:
            self.state = self.state.to(self.device)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Raises TypeError: this layer holds a state, not keys and values."""
        raise self._not_keys()

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Raises TypeError: this layer holds a state, not keys and values."""
        raise self._not_keys()

    @staticmethod
    def _not_keys() -> TypeError:
        return TypeError(
            "this cache belongs to a model of mka.models; a model with other attention needs "
            "its own"
        )


def state_layer(cache: Cache, index: int) -> StateLayer:
    """The layer of a cache with this index, from 0.

    Raises ValueError for a cache without layers, and for one that another model has
    filled.
    """
    if not hasattr(cache, "layers"):
        raise InputError(
            f"the cache is a {type(cache).__name__}; allowed: one with a layer for each layer of "
            "the model, or None"
        )
    while len(cache.layers) <= index:
        cache.layers.append(StateLayer())
    # transformers chose the kinds of layers for its own attention; unused ones can be
    # replaced.
    layer: Any = cache.layers[index]
    if not isinstance(layer, StateLayer):
        if layer.is_initialized:
            raise ValueError(
                f"past_key_values holds a {type(layer).__name__} of another model's keys; pass "
                "None or a new cache"
            )
        layer = cache.layers[index] = StateLayer()
    return layer


def begin_call(
    cache: Cache, layer: StateLayer, x: Tensor, valid: Tensor | None, past: Tensor | None = None
) -> None:
    """Check a cache before one of its layers reads this call's columns.

    Args:
        cache: the cache.
        layer: its layer that is about to read.
        x: (B, T, C).
        valid: (B, T) bool, False for padding. None: all are tokens.
        past: (B, S), what the mask says of earlier columns. Default: None, nothing.

    Raises ValueError if there is no room in all layers, if `past` contradicts the
    earlier masks, or if the layers of the cache have not seen the same tokens.
    """
    ours = [each for each in cache.layers if isinstance(each, StateLayer)]
    # Before the first layer reads, all must have room: a call that failed halfway
    # through would leave a cache that nobody can use again.
    if layer is ours[0]:
        if past is not None:
            layer.check_past(past)
        kept = [each for each in ours if each.form is not None]
        counts = [x.shape[1]] * x.shape[0] if valid is None or not kept else valid.sum(1).tolist()
        try:
            for each in kept:
                each.reserve(x, counts)
        except InputError:
            for each in kept:
                if each.state is not None:
                    each.state.release()
            raise
        return
    if not x.shape[1]:
        return
    # The first layer has read this call already, so what it had before is in `past`.
    first = ours[0].state
    seen = [0] * x.shape[0] if layer.state is None else layer.state.lengths
    if first is not None and first.past != seen:
        before, here = cache.layers.index(ours[0]), cache.layers.index(layer)
        raise InputError(
            "the cache is torn, as by a call that ended in an error: before this call layer "
            f"{before} had seen {max(first.past)} tokens and layer {here} had seen "
            f"{max(seen)}; start with a new cache"
        )


def memory_cache(
    model: nn.Module,
    config: LongTermConfig | None = None,
    bank: Bank | None = None,
    reversible: int | None = None,
) -> Cache:
    """An empty cache for a model, to be passed as `past_key_values`.

    Args:
        model: a model with mechanisms.
        config: where the long-term memory is kept. Default: None, on the device.
        bank: its documents are the far past of every row. Default: None, no bank.
        reversible: how many of its latest tokens a row can take back (`cache.crop`).
            Default: None, 64, or in `generate` as many as the longest draft has.

    Raises ValueError for a `reversible` below 0, for a bank or a config other than the
    default if the model retrieves nothing, and for a bank with a damaged document.
    """
    check_whole("reversible", reversible, 0)
    everywhere = LongTerm.of(config or LongTermConfig())
    attentions = [module for module in model.modules() if isinstance(module, CausalAttention)]
    remembering = [attention.retrieves for attention in attentions]
    if not attentions and (everywhere.is_special or bank):
        raise InputError(
            f"{type(model).__name__} is not an mka model, so it has no long-term memory"
        )
    # The dtype of activations: the weights of a quantized layer have another one.
    dtype = getattr(model, "dtype", None)
    # Layers without a memory keep the default. If no layer has one, all get what was
    # asked for, and the mechanism refuses it with its own message.
    usual = everywhere if not any(remembering) else LongTerm.of(LongTermConfig())
    kinds = [everywhere if remembers else usual for remembers in remembering]
    empty = [
        attention.initial_state(1, dtype, longterm=kind)
        for attention, kind in zip(attentions, kinds, strict=True)
    ]
    # The empty states tell the bank which stores each layer has.
    layers = bank.layers(empty) if bank else [None] * len(attentions)
    places = [
        replace(kind, bank=layer if remembers or not any(remembering) else None)
        for kind, layer, remembers in zip(kinds, layers, remembering, strict=True)
    ]
    made = zip(attentions, places, strict=True)
    forms = [attention.initial_state(1, dtype, longterm=place).form for attention, place in made]
    return Cache(layers=[StateLayer(reversible, form) for form in forms])


def states(cache: Cache) -> list[State]:
    """The states of a cache, in the order of its layers, without those that do not
    exist yet."""
    return [
        layer.state
        for layer in cache.layers
        if isinstance(layer, StateLayer) and layer.state is not None
    ]
