"""What decoding keeps of every row: one store for each tensor that a later token can
read.

    entry i of a store       one per `every` tokens: keys (1), chunk summaries (c),
                             session slots (stride)
    place i                  if all entries are read; such a store grows in steps
    place i mod limit        if only the `latest` are read: a ring of limit = latest +
                             ceil(reversible / every) places
    place i, i < first       in such a store the row's `first` entries stay in front of
                             the ring, which holds those after them

    tokens 0 1 2 3 4 5 6      latest 4, reversible 0, first 0     ring  4 5 6 3
    tokens 0 1 2 3 4 5 6      latest 4, reversible 0, first 2     0 1   ring  6 3 4 5

Every row counts its own tokens, so padding and batch-mates do not matter. Taking tokens
back only lowers the count: what they wrote is overwritten later. A ring has lost the
entries before its newest `limit`, so `reversible` bounds how many tokens can be taken
back.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mka.errors import InputError, check_at_least
from mka.memory.entry import Entry, lasting, runs, store
from mka.memory.places import Joined, LongTerm
from mka.memory.store import RecordForm, Records, Store

STEP = 64
"""A store grows by an eighth, rounded up to a multiple of this many entries, so that
most tokens find room and copy nothing."""


@dataclass(frozen=True)
class StateForm:
    """All that determines a state, except its number of rows and `reversible`."""

    owner: str
    entries: Mapping[str, Entry]
    device: torch.device
    longterm: LongTerm

    def make(self, batch_size: int, device: torch.device, reversible: int) -> "State":
        """An empty state of `batch_size` rows on the device."""
        return State(self.owner, self.entries, batch_size, device, reversible, self.longterm)


class State:
    """The stores of `batch_size` rows, and how many tokens each row has seen.

    Args:
        owner: name of the mechanism that makes and reads the state.
        entries: the form of each store, by its name.
        batch_size: B, the number of rows.
        device: where the stores are. Default: None, torch's default device.
        reversible: how many of its latest tokens a row can take back (`crop`), if the
            state is bounded. Default: 0.
        longterm: where chunks are kept, and what was remembered before. The summaries
            of a bank's chunks precede the row's own, in every row. Default: None, on
            the device, no bank.

    Raises ValueError if batch_size is below 1 or reversible below 0.

    Operations return the state to continue with; the old one must not be used again. A
    call of the mechanism first announces how many tokens it brings (`begin`), then
    writes and reads, and says that it is complete (`end`). `past` (B,) counts the
    tokens before the call, `lengths` (B,) those after it, and `furthest` (B,) the most
    that the row has ever had. All are lists of int, so that a step does not wait for
    the device.
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
        bank = self.longterm.bank
        self.banked = bank.chunks if bank else 0
        self.stores: dict[str, Store] = {}
        self.tensors: dict[str, Tensor] = {}
        for name, entry in entries.items():
            # What is read chunk by chunk can lie on a slower medium; what chunks are
            # found by is compared with every query, and stays on the device.
            if self.longterm.is_apart and entry.block is not None:
                form = RecordForm.of(entry.shape, entry.block, entry.dtype)
                self.stores[name] = self.longterm.make_store(form, batch_size, device)
                continue
            self.tensors[name] = store(
                batch_size, self.before(name), entry.shape, dtype=entry.dtype, device=device
            )
            if bank and name in bank.summaries:
                self.tensors[name][:] = bank.summaries[name].to(self.tensors[name])

    @property
    def num_tokens(self) -> Tensor:
        """(B,) valid tokens that each row has seen, on the CPU."""
        return torch.tensor(self.lengths)

    @property
    def batch_size(self) -> int:
        """B, the number of rows."""
        return len(self.lengths)

    @property
    def device(self) -> torch.device:
        """The device of the stores that are tensors; chunks may be kept elsewhere."""
        return next(iter(self.tensors.values())).device

    @property
    def form(self) -> StateForm:
        """What another state of this kind is made from."""
        return StateForm(self.owner, self.entries, self.device, self.longterm)

    @property
    def tokens_a_chunk(self) -> int:
        """Chunk size c, in tokens. Raises ValueError for a state that keeps no
        chunks."""
        # fmka's chunks are one entry (their mean) of c tokens, mka's c entries of one
        # token.
        return max(
            entry.every * (entry.block or 1) for entry in self.entries.values() if entry.block
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the entries that are held, over all rows."""
        return sum(
            entry.nbytes(length, self.reversible)
            for entry in self.entries.values()
            for length in self.lengths
        )

    @property
    def allocated_nbytes(self) -> int:
        """Bytes that are allocated, spare capacity and the summaries of a bank
        included."""
        here = sum(x.numel() * x.element_size() for x in self.tensors.values())
        return here + sum(records.allocated_nbytes for records in self.stores.values())

    # What users do with a state.

    def select(self, rows: Tensor | Sequence[int]) -> "State":
        """The rows with these indices (N,), in this order; a row may be taken several
        times."""
        index = torch.as_tensor(rows, device=self.device)
        chosen = index.tolist()
        self.past, self.lengths, self.furthest = (
            [counts[row] for row in chosen] for counts in (self.past, self.lengths, self.furthest)
        )
        for records in self.stores.values():
            records.select(chosen)
        # (B, S, G, D) lies in memory as (B, G, S, D) (`mka.memory.entry.store`):
        # transposing around the copy keeps it so.
        return self._map(lambda x: x.transpose(1, -2).index_select(0, index).transpose(1, -2))

    def reorder(self, beams: Tensor) -> "State":
        """The same as `select`, under the name that beam search uses."""
        return self.select(beams)

    def repeat(self, times: int) -> "State":
        """Every row `times` times; copies of a row are adjacent."""
        return self.select(torch.arange(self.batch_size).repeat_interleave(times))

    def crop(self, num_tokens: int | Sequence[int] | Tensor) -> "State":
        """Every row as if it had ended after `num_tokens` tokens, one number or (B,).

        A row that is shorter stays as it is. Raises ValueError if what that needs is no
        longer
        held: a bounded state goes back at most `reversible` tokens from the longest
        that the row has been.
        """
        given = torch.as_tensor(num_tokens).expand(self.batch_size).tolist()
        wanted = [min(new, old) for new, old in zip(given, self.lengths, strict=True)]
        # From the furthest, not from the present length: after a crop the ring still
        # holds entries of the tokens that were taken back, where older ones had been.
        bounded = any(entry.latest is not None for entry in self.entries.values())
        for new, old, furthest in zip(wanted, self.lengths, self.furthest, strict=True):
            least = max(0, furthest - self.reversible) if bounded else 0
            if new != old and new < least:
                raise InputError(
                    f"num_tokens is {new}; this state of {self.owner} can be cropped to "
                    f"{least} tokens or more: it was "
                    f"made with reversible={self.reversible} and its row has seen {furthest}"
                )
        self.past, self.lengths = list(wanted), wanted
        return self

    def to(self, device: torch.device | str) -> "State":
        """The state with its tensors on the device; stores of chunks elsewhere stay
        there."""
        return self._map(lambda x: x.to(device))

    def detach(self) -> "State":
        """The same numbers without the history that gradients need."""
        return self._map(lambda x: x.detach())

    def _map(self, change: Callable[[Tensor], Tensor]) -> "State":
        with lasting():
            self.tensors = {name: change(x) for name, x in self.tensors.items()}
        return self

    # What mechanisms do with it.

    def check(self, owner: str, entries: Mapping[str, Entry], batch_size: int) -> None:
        """Raises ValueError for a state of another mechanism, other sizes or another
        number of rows."""
        # Every layer asks at every token. Comparing the entries once is enough: a
        # mechanism passes the same object each time.
        if owner == self.owner and self.batch_size == batch_size and self.checked is entries:
            return
        if owner != self.owner:
            raise InputError(
                f"the state belongs to {self.owner}; pass one made by {owner}.initial_state"
            )
        if self.batch_size != batch_size:
            raise InputError(
                f"the state holds {self.batch_size} rows; x has {batch_size}; the numbers must "
                "match"
            )
        for name, entry in entries.items():
            ours = self.entries.get(name)
            # The dtype may differ: `write` converts.
            if ours is None or replace(ours, dtype=entry.dtype) != entry:
                raise InputError(
                    f"the state was made for other options of {owner}: its {name} is {ours}, "
                    f"not {entry}"
                )
        self.checked = entries

    def reserve(self, counts: Sequence[int]) -> list[int]:
        """Make room for `counts` (B,) more tokens; returns the lengths that the rows
        will have.

        Raises ValueError, with the contents unchanged, if a store of chunks has no
        room.
        """
        lengths = [past + count for past, count in zip(self.lengths, counts, strict=True)]
        for name, records in self.stores.items():
            records.reserve(max(lengths) // self.entries[name].every)
        return lengths

    def release(self) -> None:
        """Free the room that `reserve` made for tokens that did not come."""
        for name, records in self.stores.items():
            records.release(max(self.lengths) // self.entries[name].every)

    def begin(self, counts: Sequence[int]) -> None:
        """Start a call that brings `counts` (B,) valid tokens; `end` completes it.

        Raises ValueError, with the contents unchanged, if a store has no room, or if
        the previous call was not completed: its tokens are counted, but not all of them
        were written.
        """
        if self.in_call:
            raise InputError(
                f"the state of {self.owner} is torn: a call on it ended in an error; start "
                "with a new one"
            )
        # Room first: it is all that can fail, and nothing has changed yet.
        lengths = self.reserve(counts)
        self.in_call = True
        self.past, self.lengths = self.lengths, lengths
        self.furthest = [max(pair) for pair in zip(self.furthest, self.lengths, strict=True)]

    def end(self) -> None:
        """Complete the call: all of its entries are written."""
        self.in_call = False

    @property
    def is_fresh(self) -> bool:
        """Whether no row had a token before this call."""
        return not any(self.past)

    @property
    def is_even(self) -> bool:
        """Whether all rows have equally many tokens, before this call and after it."""
        return len(set(self.past)) == len(set(self.lengths)) == 1

    def starts(self, device: torch.device) -> Tensor:
        """Tokens that each row had before this call: (B,), or (1,) if the rows are
        even."""
        return torch.tensor(self.past[:1] if self.is_even else self.past, device=device)

    def limit(self, name: str) -> int | None:
        """Places of the store's ring; None for a store that grows."""
        return self.entries[name].limit(self.reversible)

    def write(self, name: str, values: Tensor) -> None:
        """Add this call's entries, values (B, N, ...).

        A row with fewer than N has them in its first columns; the others are ignored.
        Raises ValueError for values with a gradient if the store keeps records
        (`is_apart`).
        """
        every, limit = self.entries[name].every, self.limit(name)
        first, last = ([n // every for n in counts] for counts in (self.past, self.lengths))
        if name in self.stores:
            return self._write_apart(name, values, first, last)
        first, last = ([n + self.before(name) for n in counts] for counts in (first, last))
        self._grow(name, max(last))
        data = self.tensors[name]
        # Written in place, except where an earlier read may need the old entries for
        # its gradient.
        if data.requires_grad or (values.requires_grad and torch.is_grad_enabled()):
            data = data.clone()
        entry = self.entries[name]
        # Even rows, the common case, write the same places: slices, without an index
        # tensor.
        if self.is_even:
            for begin, end, place in runs(entry, first[0], last[0], limit):
                data[:, place : place + end - begin] = values[
                    :, begin - first[0] : end - first[0]
                ].to(data.dtype)
        else:
            column = torch.arange(values.shape[1], device=data.device)
            starts, ends = (
                torch.tensor(counts, device=data.device)[:, None] for counts in (first, last)
            )
            fresh = column < ends - starts
            # Of more entries than the ring has places only the last `limit` are
            # written: an indexed write to one place twice has no defined order.
            if limit is not None:
                fresh &= (column >= ends - starts - limit) | (starts + column < entry.first)
            row, column = fresh.nonzero(as_tuple=True)
            data[row, entry.place(starts[row, 0] + column, limit)] = values[row, column].to(
                data.dtype
            )
        self.tensors[name] = data

    def _write_apart(self, name: str, values: Tensor, first: list[int], last: list[int]) -> None:
        if values.requires_grad and torch.is_grad_enabled():
            raise InputError(
                f"longterm_store is {self.longterm.config.longterm_store!r}"
                f"{' and there is a bank' if self.banked else ''}; what is kept there has no "
                "gradient: use torch.no_grad(), or longterm_store device without a bank"
            )
        form = self.stores[name].form
        for row, (begin, end) in enumerate(zip(first, last, strict=True)):
            if end > begin:
                entries = values[row, : end - begin].reshape(end - begin, form.groups, form.width)
                self.stores[name].write(row, begin, entries)

    def before(self, name: str) -> int:
        """How many entries of a bank precede the row's own."""
        bank = self.longterm.bank
        return bank.chunks if bank and name in bank.summaries else 0

    def is_apart(self, name: str) -> bool:
        """Whether the entries are read as `records`, not as a tensor."""
        return name in self.stores

    def records(self, name: str) -> Records:
        """The records of a store that is not a tensor; chunks of a bank come first."""
        own, bank = self.stores[name], self.longterm.bank
        return Joined(bank.records[name], own, bank.chunks) if bank else own

    def all(self, name: str) -> Tensor:
        """(B, N, ...): every entry of a growing store, a bank's first; N is the longest
        row's."""
        return self.tensors[name][
            :, : self.before(name) + max(self.lengths) // self.entries[name].every
        ]

    def first(self, name: str) -> Tensor:
        """(B, first, ...): the places of a row's first entries, written or not."""
        # A row may not have them yet; readers mask what is not there, but need the
        # places.
        self._grow(name, self.entries[name].first)
        return self.tensors[name][:, : self.entries[name].first]

    def held(self, name: str) -> Tensor:
        """The store as it lies in memory, (B, S, ...): the first entries, then the
        others."""
        limit, longest = self.limit(name), max(self.lengths) // self.entries[name].every
        return self.tensors[name][
            :, : longest if limit is None else min(longest, self.entries[name].first + limit)
        ]

    def entry_at(self, name: str) -> Tensor:
        """The number of the entry at each place of `held`, (B or 1, S); negative if it
        is empty."""
        limit, held, every = self.limit(name), self.held(name), self.entries[name].every
        place = torch.arange(held.shape[1], device=held.device)[None]
        # A store that grows has entry i at place i. Places after a shorter row's last
        # entry need no mark: their numbers are in the future of all its queries.
        if limit is None:
            return place
        lengths = torch.tensor(
            self.lengths[:1] if self.is_even else self.lengths, device=held.device
        )[:, None]
        return self.entries[name].number_at(place, lengths // every, limit)

    def latest(self, name: str, count: int, *, after: bool) -> Tensor:
        """(B, count, ...): the newest entries, oldest first, without those of this call
        or with them (`after`).

        If a row has fewer, its first columns hold arbitrary finite values.
        """
        ends = [n // self.entries[name].every for n in (self.lengths if after else self.past)]
        if name in self.stores:
            return self._latest_apart(name, ends, count)
        limit, data = self.limit(name), self.tensors[name]
        if self.is_even and limit is None and ends[0] >= count:
            return data[:, ends[0] - count : ends[0]]
        entry = (
            torch.tensor(ends, device=data.device)[:, None]
            - count
            + torch.arange(count, device=data.device)
        )
        # Missing entries read place 0, which is zeros or an entry: finite, for masks to
        # hide.
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
        # A ring never has more places than its limit and the first entries in front of
        # it.
        if limit is not None:
            limit += self.entries[name].first
            needed = min(needed, limit)
        if needed <= data.shape[1]:
            return
        capacity = -(-(needed + needed // 8) // STEP) * STEP
        places = capacity if limit is None else min(capacity, limit)
        # By an eighth at a time: copying costs a constant number of moves per token,
        # spare room at most an eighth and STEP entries.
        larger = store(data.shape[0], places, data.shape[2:], dtype=data.dtype, device=data.device)
        larger[:, : data.shape[1]] = data
        self.tensors[name] = larger
