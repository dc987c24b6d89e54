"""A mechanism's state as a layer of transformers' cache.

transformers counts columns, padding included; a state counts each row's tokens. The layer keeps both, so that `crop`
can tell how many tokens of a row the last columns held.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from mka.attention import CausalAttention
from mka.config import LongTermConfig
from mka.limits import InputError
from mka.memory.bank import Bank
from mka.memory.places import LongTerm
from mka.memory.state import State, StateForm

REVERSIBLE = 64
"""Latest tokens that can be taken back: assisted decoding proposes fewer at a time."""


class StateLayer(CacheLayerMixin):
    """The cache of one block. A call adds its columns with `attend`."""

    is_sliding = False
    is_croppable = True
    supports_early_init = False

    def __init__(self, reversible: int = REVERSIBLE, form: StateForm | None = None) -> None:
        """`form`: that of its state; None: as the mechanism makes it."""
        super().__init__()
        self.reversible, self.form = reversible, form
        self.state: State | None = None
        self.calls: list[tuple[int, Tensor | None]] = []
        self.device = torch.device("cpu")

    def attend(self, attention: CausalAttention, x: Tensor, positions: Tensor | None, valid: Tensor | None) -> Tensor:
        """y (B, T, C) of the next columns x (B, T, C), of which `valid` (B, T) are tokens."""
        if self.state is None and not self.open(x):
            self.keep(attention.initial_state(x.shape[0], x.dtype, x.device, reversible=self.reversible))
        y, self.state = attention(x, positions=positions, valid=valid, state=self.state)
        if valid is None and self.calls and self.calls[-1][1] is None:
            self.calls[-1] = (self.calls[-1][0] + x.shape[1], None)
        else:
            self.calls.append((x.shape[1], valid))
        return y

    def open(self, x: Tensor) -> bool:
        """Make the state for the rows of x (B, T, C) where its form is known; whether it is."""
        if self.form is not None:
            device = x.device if self.form.device.type == "meta" else self.form.device
            self.keep(self.form.make(x.shape[0], device, self.reversible))
        return self.form is not None

    def keep(self, state: State) -> None:
        self.state, self.device, self.is_initialized = state, state.device, True

    def reserve(self, x: Tensor, counts: Sequence[int]) -> None:
        """Make room for the next call, x (B, T, C) with `counts` (B,) tokens. Raises ValueError where there is none."""
        if self.state is None:
            self.open(x)
        if self.state is not None:
            self.state.reserve(counts)

    def get_seq_length(self) -> int:
        """Columns seen, padding included."""
        return sum(columns for columns, _ in self.calls)

    def valid_columns(self) -> Tensor | None:
        """(B, columns seen) bool, False for padding; None where there was none."""
        if self.state is None or all(valid is None for _, valid in self.calls):
            return None
        rows = self.state.batch_size
        calls = [
            torch.ones(rows, count, dtype=torch.bool, device=self.device) if valid is None else valid.to(self.device)
            for count, valid in self.calls
        ]
        return torch.cat(calls, dim=1)

    def check_past(self, past: Tensor) -> None:
        """Raises InputError unless `past` (B, S) marks as padding what was padding when it was read."""
        seen, columns = self.valid_columns(), self.get_seq_length()
        if past.shape[1] != columns:
            raise InputError(
                f"attention_mask has {past.shape[1]} columns before this call's; the cache holds {columns}"
            )
        seen = torch.ones_like(past) if seen is None else seen.to(past.device)
        if not torch.equal(past, seen):
            row, column = (past != seen).nonzero()[0].tolist()
            said, was = ("a token", "padding") if past[row, column] else ("padding", "a token")
            raise InputError(
                f"attention_mask says that column {column} of row {row} is {said}; it was read as {was}, and a memory "
                "cannot take that back: give each call the mask that the cache was filled with (generate makes one of "
                "pad_token_id where none is given), or start a new cache"
            )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: there is no limit."""
        return -1

    @property
    def batch_size(self) -> int:
        if self.state is None:
            raise AttributeError("batch_size is known once the layer has seen a token")
        return self.state.batch_size

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last columns: a negative number of them; a positive one is what is to be left.

        Raises ValueError further back than the state allows, which it names.
        """
        length = self.get_seq_length()
        left = length + tokens_to_remove if tokens_to_remove <= 0 else min(length, tokens_to_remove)
        if self.state is None or left == length:
            return
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
        self.state, self.calls, self.is_initialized = None, [], False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.select(indices)
            self.calls = [
                (count, None if valid is None else valid[indices.to(valid.device)]) for count, valid in self.calls
            ]

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.batch_select_indices(torch.arange(self.state.batch_size).repeat_interleave(repeats))

    def offload(self) -> None:
        if self.state is not None:
            self.state = self.state.to("cpu")

    def prefetch(self) -> None:
        if self.state is not None:
            self.state = self.state.to(self.device)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise self._not_keys()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise self._not_keys()

    @staticmethod
    def _not_keys() -> TypeError:
        return TypeError("this cache belongs to a model of mka.models; a model with other attention needs its own")


def state_layer(cache: Cache, index: int) -> StateLayer:
    """The layer of that block; one that was not used yet is replaced by ours, whatever kind transformers made.

    Raises ValueError for a cache that another model has filled.
    """
    if not hasattr(cache, "layers"):
        raise InputError(f"the cache is a {type(cache).__name__}; allowed: one with a layer for each block, or None")
    while len(cache.layers) <= index:
        cache.layers.append(StateLayer())
    layer: Any = cache.layers[index]
    if not isinstance(layer, StateLayer):
        if layer.is_initialized:
            raise ValueError(
                f"past_key_values holds a {type(layer).__name__} of another model's keys; pass None or a new cache"
            )
        layer = cache.layers[index] = StateLayer()
    return layer


def begin_call(cache: Cache, layer: StateLayer, x: Tensor, valid: Tensor | None, past: Tensor | None = None) -> None:
    """What must hold before a block, whose layer of the cache that is, reads its columns x (B, T, C).

    Before the first block there must be room in all of them: one that fails in the middle leaves a cache that nobody
    can go on with. What the mask says of the columns before, `past` (B, S), must be what was said when they were read.
    Every later block must stand where the first one stood. Raises ValueError.
    """
    ours = [each for each in cache.layers if isinstance(each, StateLayer)]
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
    first = ours[0].state
    seen = [0] * x.shape[0] if layer.state is None else layer.state.lengths
    if first is not None and first.past != seen:
        before, here = cache.layers.index(ours[0]), cache.layers.index(layer)
        raise InputError(
            "the cache is torn, as by a call that ended in an error: before this call block "
            f"{before} had seen {max(first.past)} tokens and block {here} had seen {max(seen)}; start with a new cache"
        )


def memory_cache(model: nn.Module, config: LongTermConfig | None = None, bank: Bank | None = None) -> Cache:
    """An empty cache for `past_key_values`, whose long-term memory is kept and searched as `config` says.

    With a bank, its documents are the far past of every row. Raises ValueError for a model that retrieves nothing and
    for a bank of another model.
    """
    everywhere = LongTerm.of(config or LongTermConfig())
    attentions = [module for module in model.modules() if isinstance(module, CausalAttention)]
    remembering = [attention.retrieves for attention in attentions]
    if not attentions and (everywhere.is_special or bank):
        raise InputError(f"{type(model).__name__} is no model of mka; it has no long-term memory to keep elsewhere")
    dtype = getattr(model, "dtype", None)  # that of its activations: a quantized layer's weights have another
    usual = everywhere if not any(remembering) else LongTerm.of(LongTermConfig())  # of layers without a memory
    kinds = [everywhere if remembers else usual for remembers in remembering]
    empty = [
        attention.initial_state(1, dtype, longterm=kind) for attention, kind in zip(attentions, kinds, strict=True)
    ]
    layers = bank.layers(empty) if bank else [None] * len(attentions)
    places = [
        replace(kind, bank=layer if remembers or not any(remembering) else None)
        for kind, layer, remembers in zip(kinds, layers, remembering, strict=True)
    ]
    made = zip(attentions, places, strict=True)
    forms = [attention.initial_state(1, dtype, longterm=place).form for attention, place in made]
    return Cache(layers=[StateLayer(form=form) for form in forms])


def states(cache: Cache) -> list[State]:
    """The states of a cache, first block first."""
    return [layer.state for layer in cache.layers if isinstance(layer, StateLayer) and layer.state is not None]
