"""Where a state keeps its long-term memory, and what it remembers from a bank."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mka.memory.disk import DiskStore
from mka.memory.options import LongTermConfig
from mka.memory.store import Budget, MemoryStore, RecordForm, Records, Store


class Joined(Records):
    """A bank's records, then those of a row: chunk numbers below `first` are the
    bank's.

    Args:
        bank: records of the bank, shared by all rows.
        own: the store of the rows' own records.
        first: how many chunks the bank has.
    """

    def __init__(self, bank: Records, own: Store, first: int) -> None:
        self.form, self.bank, self.own, self.first = own.form, bank, own, first

    def read(self, row: Tensor, chunk: Tensor, group: Tensor) -> Tensor:
        """The N records named by three (N,) tensors, as (N, block, width), where `own`
        has them."""
        # If no chunk of the bank is named, one read is enough, with nothing to merge.
        banked = chunk < self.first
        if not bool(banked.any()):
            return self.own.read(row, chunk - self.first, group)
        old = self.bank.read(row[banked], chunk[banked], group[banked])
        new = self.own.read(row[~banked], chunk[~banked] - self.first, group[~banked])
        # Back in the order asked for; the bank is on the CPU, the row's own may be on a
        # GPU.
        found = new.new_empty(len(chunk), *new.shape[1:])
        found[banked.to(new.device)], found[~banked.to(new.device)] = old.to(new), new
        return found


@dataclass(frozen=True)
class BankLayer:
    """What one layer of the model has in a bank, by the names of its state's stores."""

    chunks: int
    """Chunks of all documents together"""
    summaries: Mapping[str, Tensor]
    """(chunks, ...) each: what the chunks are found by"""
    records: Mapping[str, Records]
    """What is read in the chunks"""


@dataclass(frozen=True)
class LongTerm:
    """How a state keeps its long-term memory, and the bank that it remembers.

    Args:
        config: where chunks are kept. Default: on the device.
        budget: limit in bytes, shared by all layers of a model. Default: none.
        bank: what this layer has in a bank. Default: None, no bank.
    """

    config: LongTermConfig = field(default_factory=LongTermConfig)
    budget: Budget = field(default_factory=Budget)
    bank: BankLayer | None = None

    @classmethod
    def of(cls, config: LongTermConfig) -> "LongTerm":
        """As the configuration says, with a budget of `longterm_gib` GiB and no
        bank."""
        return cls(
            config,
            Budget(None if config.longterm_gib is None else int(config.longterm_gib * 2**30)),
        )

    @property
    def asked_for(self) -> str:
        """What is not the default, in words for an error message."""
        # A bank first: it needs a store of records wherever chunks are kept.
        if self.bank is not None:
            return "a bank is given"
        return f"longterm_store is {self.config.longterm_store!r}"

    @property
    def is_special(self) -> bool:
        """Whether anything is not the default."""
        return self.bank is not None or self.config.is_special

    @property
    def is_apart(self) -> bool:
        """Whether chunks are kept as records in a `Store`, through which no gradient
        flows."""
        # A bank's records come from files, so the row's own have to be records too.
        return self.bank is not None or self.config.longterm_store != "device"

    def make_store(self, form: RecordForm, rows: int, device: torch.device | str | None) -> Store:
        """An empty store of records for `rows` rows; `device` is where the state is.

        Raises InputError if the folder cannot hold files.
        """
        # With a bank, longterm_store "device" keeps records too, next to the state.
        if self.config.longterm_store == "disk":
            return DiskStore(form, rows, self.budget, self.config.longterm_folder)
        return MemoryStore(
            form,
            rows,
            self.budget,
            (device or "cpu") if self.config.longterm_store == "device" else "cpu",
        )
