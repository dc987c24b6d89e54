"""The processes that train together: who this one is, and what all of them agree on.

torchrun or deepspeed start the processes; accelerate makes the process group (nccl on GPUs, gloo on CPUs). One
process started alone is the same with a single rank, and no group.
"""

import gc
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage] (documented there)
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from mka.limits import InputError

T = TypeVar("T")


class RankLost(RuntimeError):
    """A collective failed because another rank has died or does not answer."""


@dataclass(frozen=True)
class Ranks:
    """This process among `count`. Methods marked collective must be called by every rank, in the same order."""

    accelerator: Accelerator | None = None

    @property
    def rank(self) -> int:
        return self.accelerator.process_index if self.accelerator else 0

    @property
    def count(self) -> int:
        return self.accelerator.num_processes if self.accelerator else 1

    @property
    def is_main(self) -> bool:
        """The one that prints and writes."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        return self.accelerator.device if self.accelerator else torch.device("cpu")

    def sum(self, values: Iterable[float]) -> list[float]:
        """Sums over all ranks, in float64. Collective."""
        values = list(values)
        if self.accelerator is None or self.count == 1:
            return values
        given = torch.tensor(values, dtype=torch.float64, device=self.device)
        return self.accelerator.reduce(given, "sum").tolist()  # pyright: ignore[reportAttributeAccessIssue]

    def gather(self, value: T) -> list[T]:
        """The value of every rank, in order. Collective."""
        return gather_object([value]) if self.count > 1 else [value]

    def broadcast(self, values: torch.Tensor) -> None:
        """Overwrite `values`, in place, with those of the first rank. Collective."""
        if self.count > 1:
            torch.distributed.broadcast(values, src=0)

    def on_main(self, function: Callable[[], T]) -> T:
        """What `function` returns on the first rank, where alone it is called; an InputError or OSError reaches all."""
        answer: list[Any] = [None]
        if self.is_main:
            try:
                answer = [function()]
            except (InputError, OSError) as error:
                answer = [error]
        if self.count > 1:
            broadcast_object_list(answer)
        if isinstance(answer[0], (InputError, OSError)):
            raise answer[0]
        return answer[0]

    @contextmanager
    def first_of_machine_first(self) -> Iterator[None]:
        """The first rank of each machine runs the block while the others of that machine wait. Collective."""
        if self.accelerator is None:
            yield
            return
        with self.accelerator.local_main_process_first():
            yield

    def part(self) -> None:
        """Leave the group at the end of the job. Collective."""
        if self.accelerator is not None and self.count > 1:
            gc.collect()  # what still holds the group's threads would abort the process at its exit
            self.accelerator.wait_for_everyone()
            self.accelerator.state.destroy_process_group()

    def check_same(self, settings: Mapping[str, Any]) -> None:
        """Raises InputError, on every rank, if a setting differs between ranks. Collective."""
        mine = json.loads(json.dumps(dict(settings)))
        for rank, theirs in enumerate(all_settings := self.gather(mine)):
            first = all_settings[0]
            for name in first.keys() | theirs.keys():
                if first.get(name) != theirs.get(name):
                    values = f"{first.get(name)!r} on rank 0 and {theirs.get(name)!r} on rank {rank}"
                    raise InputError(f"the ranks differ: {name} is {values}; start all with the same command")


def start_ranks(timeout: float = 1800) -> Ranks:
    """Join the processes of this launch. A collective that takes longer than `timeout` seconds is an error.

    Raises RankLost if the others cannot be reached.
    """
    share_the_cores()
    group = InitProcessGroupKwargs(init_method=meeting_point(), timeout=timedelta(seconds=timeout))
    with lost_ranks_said("while the ranks were joining"):
        return Ranks(Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[group]))


def meeting_point() -> str | None:
    """Where the ranks meet, as torch's init_method; None: where the launcher says.

    torchrun keeps one store for all attempts of a launch. A rank that comes back before the others would read there the
    address of one that has died, and spend the attempt on it; so each attempt gets a part of the store to itself. On
    one machine only: several count their attempts apart.
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return None
    scheme = f"mka-attempt-{attempt}"

    def meet(url: str, **options: Any) -> Iterator[tuple[Any, int, int]]:
        for store, rank, count in rendezvous("env://", **options):
            yield PrefixStore(scheme, store), rank, count

    with suppress(RuntimeError):  # this process has said so before
        register_rendezvous_handler(scheme, meet)
    return f"{scheme}://"


def share_the_cores() -> None:
    """Where the launcher has not done it, give each of this machine's ranks its part of the processor."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    if "RANK" in os.environ:
        os.environ["LOCAL_WORLD_SIZE"] = str(local)
        if "OMP_NUM_THREADS" not in os.environ:
            threads = max(1, (os.cpu_count() or 1) // local)
            os.environ["OMP_NUM_THREADS"] = str(threads)
            torch.set_num_threads(threads)


@contextmanager
def lost_ranks_said(when: str) -> Iterator[None]:
    """Turn the many errors of a broken collective into RankLost, with the library's reason on one line."""
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        if not is_lost_contact(error, reason):
            raise
        raise RankLost(f"lost another rank {when}: {reason[:200]}") from error


def is_lost_contact(error: RuntimeError, reason: str) -> bool:
    """gloo raises a plain RuntimeError that only its text tells from others."""
    if isinstance(error, torch.distributed.DistError):
        return True
    return type(error) is RuntimeError and "gloo" in reason.lower()
