"""Where a state keeps its long-term memory, and what it remembers from before it began."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mka.config import LongTermConfig
from mka.memory.disk import DiskStore
from mka.memory.store import Budget, MemoryStore, RecordForm, Records, Store


class Joined(Records):
    """A bank's records before those of every row: chunk numbers below `first` are the bank's."""

    def __init__(self, bank: Records, own: Store, first: int) -> None:
        self.form, self.bank, self.own, self.first = own.form, bank, own, first

    def read(self, row: Tensor, chunk: Tensor, group: Tensor) -> Tensor:
        banked = chunk < self.first
        if not bool(banked.any()):
            return self.own.read(row, chunk - self.first, group)
        old = self.bank.read(row[banked], chunk[banked], group[banked])
        new = self.own.read(row[~banked], chunk[~banked] - self.first, group[~banked])
        found = new.new_empty(len(chunk), *new.shape[1:])
        found[banked.to(new.device)], found[~banked.to(new.device)] = old.to(new), new
        return found


@dataclass(frozen=True)
class BankLayer:
    """What one block has of a bank: summaries by the names of the state's stores, and records to be read."""

    chunks: int
    summaries: Mapping[str, Tensor]
    """(chunks, ...) each"""
    records: Mapping[str, Records]


@dataclass(frozen=True)
class LongTerm:
    """How a state keeps its long-term memory, and what it remembers from before. The budget is that of all blocks."""

    config: LongTermConfig = field(default_factory=LongTermConfig)
    budget: Budget = field(default_factory=Budget)
    bank: BankLayer | None = None

    @classmethod
    def of(cls, config: LongTermConfig) -> "LongTerm":
        return cls(config, Budget(None if config.longterm_gib is None else int(config.longterm_gib * 2**30)))

    @property
    def asked_for(self) -> str:
        """What of it is not as usual, in words."""
        if self.bank is not None:
            return "a bank is given"
        return f"longterm_store is {self.config.longterm_store!r}"

    @property
    def is_special(self) -> bool:
        return self.bank is not None or self.config.is_special

    @property
    def is_apart(self) -> bool:
        """Whether chunks are kept in a store of their own, which has no gradient."""
        return self.bank is not None or self.config.longterm_store != "device"

    def make_store(self, form: RecordForm, rows: int, device: torch.device | str | None) -> Store:
        if self.config.longterm_store == "disk":
            return DiskStore(form, rows, self.budget, self.config.longterm_folder)
        return MemoryStore(
            form, rows, self.budget, (device or "cpu") if self.config.longterm_store == "device" else "cpu"
        )
