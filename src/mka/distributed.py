"""The processes that train together: which one this is, and what all of them agree on.

torchrun or deepspeed starts the processes; accelerate creates the process group (nccl
on GPUs, gloo on CPUs). A process started alone is the same with a single rank and no
group.
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
from torch.distributed import PrefixStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.rendezvous import register_rendezvous_handler, rendezvous

from mka.errors import InputError

T = TypeVar("T")


class RankLost(RuntimeError):
    """A collective operation failed because another rank has died or does not
    answer."""


@dataclass(frozen=True)
class Ranks:
    """This process among all that train together.

    Methods marked collective must be called by every rank, in the same order.
    """

    accelerator: Accelerator | None = None

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        return self.accelerator.process_index if self.accelerator else 0

    @property
    def count(self) -> int:
        """The number of processes, on all machines together."""
        return self.accelerator.num_processes if self.accelerator else 1

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that prints and writes."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """The device that this rank computes on."""
        return self.accelerator.device if self.accelerator else torch.device("cpu")

    def sum(self, values: Iterable[float]) -> list[float]:
        """The sum of each value over all ranks, in float64. Collective."""
        # One exchange for all values: over a network it is the number that costs, not
        # the size.
        values = list(values)
        if self.accelerator is None or self.count == 1:
            return values
        given = torch.tensor(values, dtype=torch.float64, device=self.device)
        return self.accelerator.reduce(given, "sum").tolist()  # pyright: ignore[reportAttributeAccessIssue]

    def gather(self, value: T) -> list[T]:
        """The values of all ranks, in the order of their numbers. Collective."""
        return gather_object([value]) if self.count > 1 else [value]

    def broadcast(self, values: torch.Tensor) -> None:
        """Overwrite `values`, in place, with those of the first rank. Collective."""
        if self.count > 1:
            torch.distributed.broadcast(values, src=0)

    def on_main(self, function: Callable[[], T]) -> T:
        """Call `function` on the first rank only, and return its result on every rank.
        Collective.

        An InputError or OSError that it raises is raised on every rank.
        """
        # An error is sent like a result: raised on one rank alone, it would leave the
        # others waiting in the broadcast.
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
        """Run the block on the first rank of each machine, then on the others.
        Collective."""
        if self.accelerator is None:
            yield
            return
        with self.accelerator.local_main_process_first():
            yield

    def part(self) -> None:
        """Leave the group at the end of the job. Collective."""
        if self.accelerator is not None and self.count > 1:
            # An object that still holds the group's threads would abort the process at
            # its exit.
            gc.collect()
            self.accelerator.wait_for_everyone()
            self.accelerator.state.destroy_process_group()

    def check_same(self, settings: Mapping[str, Any]) -> None:
        """Raise InputError, on every rank, if a setting differs between ranks.
        Collective."""
        # Through JSON, so that a tuple equals the list that another rank sends.
        mine = json.loads(json.dumps(dict(settings)))
        for rank, theirs in enumerate(all_settings := self.gather(mine)):
            first = all_settings[0]
            for name in first.keys() | theirs.keys():
                if first.get(name) != theirs.get(name):
                    values = (
                        f"{first.get(name)!r} on rank 0 and {theirs.get(name)!r} on rank {rank}"
                    )
                    raise InputError(
                        f"the ranks differ: {name} is {values}; start all with the same command"
                    )


def start_ranks(timeout: float = 1800) -> Ranks:
    """Join the processes of this launch.

    A collective that takes longer than `timeout` seconds fails. Raises RankLost if the
    other processes cannot be reached.
    """
    share_the_cores()
    group = InitProcessGroupKwargs(init_method=meeting_point(), timeout=timedelta(seconds=timeout))
    with lost_ranks_said("while the ranks were joining"):
        return Ranks(Accelerator(cpu=not torch.cuda.is_available(), kwargs_handlers=[group]))


def meeting_point() -> str | None:
    """Where the ranks meet, as torch's init_method; None: where the launcher says."""
    # torchrun keeps one store for all attempts of a launch. A rank that restarts before
    # the others would read the address of a dead one there, and lose the attempt; so
    # each attempt gets its own part of the store. On one machine only: several machines
    # count their attempts separately.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0" or os.environ.get("GROUP_WORLD_SIZE") != "1":
        return None
    scheme = f"mka-attempt-{attempt}"

    def meet(url: str, **options: Any) -> Iterator[tuple[Any, int, int]]:
        """The launcher's own meeting, with this attempt's part of the store."""
        for store, rank, count in rendezvous("env://", **options):
            yield PrefixStore(scheme, store), rank, count

    # torch raises RuntimeError if this process has already registered it.
    with suppress(RuntimeError):
        register_rendezvous_handler(scheme, meet)
    return f"{scheme}://"


def share_the_cores() -> None:
    """Give each of this machine's ranks its share of the cores, unless the launcher did
    so."""
    # LOCAL_SIZE is the deepspeed launcher's name for what torchrun calls
    # LOCAL_WORLD_SIZE.
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    if "RANK" in os.environ:
        os.environ["LOCAL_WORLD_SIZE"] = str(local)
        # Otherwise every rank would start a thread per core, and they would slow each
        # other down.
        if "OMP_NUM_THREADS" not in os.environ:
            threads = max(1, (os.cpu_count() or 1) // local)
            os.environ["OMP_NUM_THREADS"] = str(threads)
            torch.set_num_threads(threads)


@contextmanager
def lost_ranks_said(when: str) -> Iterator[None]:
    """Within the block, turn the many errors of a broken collective into RankLost.

    when: what was going on, for the message, which also holds the library's reason on
        one line.
    """
    try:
        yield
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        if not is_lost_contact(error, reason):
            raise
        raise RankLost(f"lost another rank {when}: {reason[:200]}") from error


def is_lost_contact(error: RuntimeError, reason: str) -> bool:
    """Whether an error means that another rank is lost; `reason` is its text on one
    line."""
    if isinstance(error, torch.distributed.DistError):
        return True
    # gloo raises a plain RuntimeError, which only its text tells from others.
    return type(error) is RuntimeError and "gloo" in reason.lower()
