"""What decoding keeps of every row: one store for each tensor that a later token can read.

    entry i of a store        one for every `every` tokens: keys (1), chunk summaries (c), session slots (stride)
    place i                   stores of which all entries are read; they grow in steps
    place i mod limit         stores of which the `latest` are read: a ring of limit = latest + reversible / every
    place i, i < first        of such a store, a row's `first` entries stay before the ring, which holds those after

    tokens 0 1 2 3 4 5 6      latest 4, reversible 0, first 0     ring  4 5 6 3
    tokens 0 1 2 3 4 5 6      latest 4, reversible 0, first 2     0 1   ring  6 3 4 5

Rows count their own tokens, so padding and batch-mates do not matter, and taking tokens back is counting down: what
they wrote is written over. Of a ring the entries before the newest `limit` are gone, hence `reversible`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mka.limits import InputError, check_at_least
from mka.memory.entry import Entry, runs, store
from mka.memory.places import Joined, LongTerm
from mka.memory.store import RecordForm, Records, Store

STEP = 64
"""Stores grow by an eighth, to a multiple of this many entries: a token does not copy what is there."""


@dataclass(frozen=True)
class StateForm:
    """All that decides a state but its rows, and how far it can be taken back."""

    owner: str
    entries: Mapping[str, Entry]
    device: torch.device
    longterm: LongTerm

    def make(self, batch_size: int, device: torch.device, reversible: int) -> "State":
        """An empty state on that device."""
        return State(self.owner, self.entries, batch_size, device, reversible, self.longterm)


class State:
    """The stores of `batch_size` rows, and how many tokens each row has seen.

    `longterm` says where chunks are kept and what was remembered before: the summaries of a bank's chunks stand before
    the row's own, at every row.

    Operations return the state to go on with; the one before is spent. A call of the mechanism first says how many
    tokens it brings, `begin`, then writes and reads. `past` (B,) counts the tokens before the call, `lengths` (B,)
    those after it; both are lists of int, so that a step does not wait for the device.
    """

    def __init__(
        self,
        owner: str,
        entries: Mapping[str, Entry],
        batch_size: int,
        device: torch.device | str | None = None,
        reversible: int = 0,
        longterm: LongTerm | None = None,
    ) -> None:
        check_at_least("batch_size", batch_size, 1)
        check_at_least("reversible", reversible, 0)
        self.owner, self.entries, self.reversible = owner, dict(entries), reversible
        self.past, self.lengths, self.furthest = ([0] * batch_size for _ in range(3))
        self.checked: Mapping[str, Entry] | None = None
        self.in_call = False
        self.longterm = longterm or LongTerm()
        self.index: Any = None
        bank = self.longterm.bank
        self.banked = bank.chunks if bank else 0
        self.stores: dict[str, Store] = {}
        self.tensors: dict[str, Tensor] = {}
        for name, entry in entries.items():
            if self.longterm.is_apart and entry.block is not None:
                form = RecordForm.of(entry.shape, entry.block, entry.dtype)
                self.stores[name] = self.longterm.make_store(form, batch_size, device)
                continue
            self.tensors[name] = store(batch_size, self.before(name), entry.shape, dtype=entry.dtype, device=device)
            if bank and name in bank.summaries:
                self.tensors[name][:] = bank.summaries[name].to(self.tensors[name])

    @property
    def num_tokens(self) -> Tensor:
        """(B,) valid tokens seen by each row, on the CPU."""
        return torch.tensor(self.lengths)

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    @property
    def device(self) -> torch.device:
        """Where the summaries are, whatever is kept elsewhere."""
        return next(iter(self.tensors.values())).device

    @property
    def form(self) -> StateForm:
        return StateForm(self.owner, self.entries, self.device, self.longterm)

    @property
    def tokens_a_chunk(self) -> int:
        """c, of a state that keeps chunks."""
        return max(entry.every * (entry.block or 1) for entry in self.entries.values() if entry.block)

    @property
    def nbytes(self) -> int:
        """Bytes of what the tokens held occupy."""
        return sum(entry.nbytes(length, self.reversible) for entry in self.entries.values() for length in self.lengths)

    @property
    def allocated_nbytes(self) -> int:
        """The same with spare capacity, and the summaries of a bank."""
        here = sum(x.numel() * x.element_size() for x in self.tensors.values())
        return here + sum(records.allocated_nbytes for records in self.stores.values())

    # What users do with a state.

    def select(self, rows: Tensor | Sequence[int]) -> "State":
        """The rows of these indices, in this order; a row may be taken several times."""
        index = torch.as_tensor(rows, device=self.device)
        chosen = index.tolist()
        self.past, self.lengths, self.furthest = (
            [counts[row] for row in chosen] for counts in (self.past, self.lengths, self.furthest)
        )
        for records in self.stores.values():
            records.select(chosen)
        self.index = None
        return self._map(lambda x: x.transpose(1, -2).index_select(0, index).transpose(1, -2))

    def reorder(self, beams: Tensor) -> "State":
        """The same as `select`, by the name that beam search gives it."""
        return self.select(beams)

    def repeat(self, times: int) -> "State":
        """Every row `times` times, copies of a row side by side."""
        return self.select(torch.arange(self.batch_size).repeat_interleave(times))

    def crop(self, num_tokens: int | Sequence[int] | Tensor) -> "State":
        """Every row as if it had ended after `num_tokens` tokens; a row that is shorter stays as it is.

        Raises ValueError below what is still held: `reversible` tokens before the furthest a row has been.
        """
        given = torch.as_tensor(num_tokens).expand(self.batch_size).tolist()
        wanted = [min(new, old) for new, old in zip(given, self.lengths, strict=True)]
        bounded = any(entry.latest is not None for entry in self.entries.values())
        for new, old, furthest in zip(wanted, self.lengths, self.furthest, strict=True):
            least = max(0, furthest - self.reversible) if bounded else 0
            if new != old and new < least:
                raise InputError(
                    f"num_tokens is {new}; this state of {self.owner} can be cropped to {least} tokens or more: it was "
                    f"made with reversible={self.reversible} and its row has seen {furthest}"
                )
        self.past, self.lengths, self.index = list(wanted), wanted, None
        return self

    def to(self, device: torch.device | str) -> "State":
        return self._map(lambda x: x.to(device))

    def detach(self) -> "State":
        """The same numbers without their gradients' history."""
        return self._map(lambda x: x.detach())

    def _map(self, change: Callable[[Tensor], Tensor]) -> "State":
        self.tensors = {name: change(x) for name, x in self.tensors.items()}
        return self

    # What mechanisms do with it.

    def check(self, owner: str, entries: Mapping[str, Entry], batch_size: int) -> None:
        """Raises ValueError for a state of another mechanism, other sizes or another number of rows."""
        if owner == self.owner and self.batch_size == batch_size and self.checked is entries:
            return
        if owner != self.owner:
            raise InputError(f"the state is one of {self.owner}; allowed: a state of {owner}, by its initial_state")
        if self.batch_size != batch_size:
            raise InputError(f"the state holds {self.batch_size} rows; x has {batch_size}; they must be as many")
        for name, entry in entries.items():
            ours = self.entries.get(name)
            if ours is None or replace(ours, dtype=entry.dtype) != entry:
                raise InputError(f"the state was made for other options of {owner}: its {name} is {ours}, not {entry}")
        self.checked = entries

    def reserve(self, counts: Sequence[int]) -> list[int]:
        """Make room for `counts` (B,) more tokens; returns the lengths there will be. Raises ValueError, with nothing
        changed, if a store has none."""
        lengths = [past + count for past, count in zip(self.lengths, counts, strict=True)]
        for name, records in self.stores.items():
            records.reserve(max(lengths) // self.entries[name].every)
        return lengths

    def release(self) -> None:
        """Give back what `reserve` has set aside for tokens that did not come."""
        for name, records in self.stores.items():
            records.release(max(self.lengths) // self.entries[name].every)

    def begin(self, counts: Sequence[int]) -> None:
        """A call brings `counts` (B,) valid tokens; `end` is its end.

        Raises ValueError, with nothing changed, if a store has no room, and where the call before has not ended: what
        it counted was not all written.
        """
        if self.in_call:
            raise InputError(f"the state of {self.owner} is torn: a call on it ended in an error; start with a new one")
        lengths = self.reserve(counts)
        self.in_call = True
        self.past, self.lengths = self.lengths, lengths
        self.furthest = [max(pair) for pair in zip(self.furthest, self.lengths, strict=True)]

    def end(self) -> None:
        """Everything of the call is written."""
        self.in_call = False

    @property
    def is_fresh(self) -> bool:
        """No row had a token before this call."""
        return not any(self.past)

    @property
    def is_even(self) -> bool:
        """All rows have seen the same number of tokens, before this call and after it."""
        return len(set(self.past)) == len(set(self.lengths)) == 1

    def starts(self, device: torch.device) -> Tensor:
        """(B,), or (1,) where all are equal: tokens seen before this call."""
        return torch.tensor(self.past[:1] if self.is_even else self.past, device=device)

    def limit(self, name: str) -> int | None:
        return self.entries[name].limit(self.reversible)

    def write(self, name: str, values: Tensor) -> None:
        """Add this call's entries: values (B, N, ...), those of each row first; what is beyond its count is ignored."""
        every, limit = self.entries[name].every, self.limit(name)
        first, last = ([n // every for n in counts] for counts in (self.past, self.lengths))
        if name in self.stores:
            return self._write_apart(name, values, first, last)
        first, last = ([n + self.before(name) for n in counts] for counts in (first, last))
        self._grow(name, max(last))
        data = self.tensors[name]
        if data.requires_grad or (values.requires_grad and torch.is_grad_enabled()):
            data = data.clone()  # earlier reads keep what they need for their gradients
        entry = self.entries[name]
        if self.is_even:
            for begin, end, place in runs(entry, first[0], last[0], limit):
                data[:, place : place + end - begin] = values[:, begin - first[0] : end - first[0]].to(data.dtype)
        else:
            column = torch.arange(values.shape[1], device=data.device)
            starts, ends = (torch.tensor(counts, device=data.device)[:, None] for counts in (first, last))
            fresh = column < ends - starts
            if limit is not None:
                fresh &= (column >= ends - starts - limit) | (starts + column < entry.first)
            row, column = fresh.nonzero(as_tuple=True)
            data[row, entry.place(starts[row, 0] + column, limit)] = values[row, column].to(data.dtype)
        self.tensors[name] = data

    def _write_apart(self, name: str, values: Tensor, first: list[int], last: list[int]) -> None:
        if values.requires_grad and torch.is_grad_enabled():
            raise InputError(
                f"longterm_store is {self.longterm.config.longterm_store!r}"
                f"{' and there is a bank' if self.banked else ''}; what is kept there has no gradient: use "
                "torch.no_grad(), or the device without a bank"
            )
        form = self.stores[name].form
        for row, (begin, end) in enumerate(zip(first, last, strict=True)):
            if end > begin:
                entries = values[row, : end - begin].reshape(end - begin, form.groups, form.width)
                self.stores[name].write(row, begin, entries)

    def before(self, name: str) -> int:
        """Entries of a bank that stand before the row's own."""
        bank = self.longterm.bank
        return bank.chunks if bank and name in bank.summaries else 0

    def is_apart(self, name: str) -> bool:
        """Whether the entries are read as records rather than with `all`."""
        return name in self.stores

    def records(self, name: str) -> Records:
        """Those of a store that lies apart; chunks of a bank come first."""
        own, bank = self.stores[name], self.longterm.bank
        return Joined(bank.records[name], own, bank.chunks) if bank else own

    def all(self, name: str) -> Tensor:
        """(B, N, ...): every entry of a growing store, a bank's first; N is that of the longest row."""
        return self.tensors[name][:, : self.before(name) + max(self.lengths) // self.entries[name].every]

    def first(self, name: str) -> Tensor:
        """(B, N, ...): the places of a row's first entries, those it does not have yet included."""
        self._grow(name, self.entries[name].first)
        return self.tensors[name][:, : self.entries[name].first]

    def held(self, name: str) -> Tensor:
        """The store as it lies, (B, S, ...): the first entries, then the others."""
        limit, longest = self.limit(name), max(self.lengths) // self.entries[name].every
        return self.tensors[name][:, : longest if limit is None else min(longest, self.entries[name].first + limit)]

    def entry_at(self, name: str) -> Tensor:
        """The number of the entry at each place of `held`, (B or 1, S); negative where there is none."""
        limit, held, every = self.limit(name), self.held(name), self.entries[name].every
        place = torch.arange(held.shape[1], device=held.device)[None]
        if limit is None:
            return place
        lengths = torch.tensor(self.lengths[:1] if self.is_even else self.lengths, device=held.device)[:, None]
        return self.entries[name].number_at(place, lengths // every, limit)

    def latest(self, name: str, count: int, *, after: bool) -> Tensor:
        """(B, count, ...): the newest entries in order, the last one last, before this call's or after them.

        Where a row has fewer, the first ones are something finite.
        """
        ends = [n // self.entries[name].every for n in (self.lengths if after else self.past)]
        if name in self.stores:
            return self._latest_apart(name, ends, count)
        limit, data = self.limit(name), self.tensors[name]
        if self.is_even and limit is None and ends[0] >= count:
            return data[:, ends[0] - count : ends[0]]
        entry = torch.tensor(ends, device=data.device)[:, None] - count + torch.arange(count, device=data.device)
        entry = entry.clamp(min=0)
        rows = torch.arange(self.batch_size, device=data.device)[:, None]
        return data[rows, self.entries[name].place(entry, limit)]

    def _latest_apart(self, name: str, ends: list[int], count: int) -> Tensor:
        shape, device = self.entries[name].shape, self.device
        found = torch.zeros(len(ends), count, *shape, dtype=self.entries[name].dtype, device=device)
        for row, end in enumerate(ends):
            if held := min(count, end):
                entries = self.stores[name].entries(row, end - held, held)
                found[row, count - held :] = entries.reshape(held, *shape).to(device)
        return found

    def _grow(self, name: str, needed: int) -> None:
        data, limit = self.tensors[name], self.limit(name)
        if limit is not None:
            limit += self.entries[name].first
            needed = min(needed, limit)
        if needed <= data.shape[1]:
            return
        capacity = -(-(needed + needed // 8) // STEP) * STEP
        places = capacity if limit is None else min(capacity, limit)
        larger = store(data.shape[0], places, data.shape[2:], dtype=data.dtype, device=data.device)
        larger[:, : data.shape[1]] = data
        self.tensors[name] = larger
