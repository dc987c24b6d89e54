"""Several ranks as threads of one process: the real `Ranks`, over an exchange that is made by
hand."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from mka import distributed
from mka.distributed import Ranks

T = TypeVar("T")
SECONDS = 60.0
"""After which a rank that the others wait for is taken to have failed."""


class Meeting:
    """Where `count` threads put down a value each and take up all of them, in order."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.values: list[Any] = [None] * count
        self.barrier = threading.Barrier(count, timeout=SECONDS)
        self.here = threading.local()

    def exchange(self, value: T) -> list[T]:
        self.barrier.wait()
        self.values[self.here.number] = value
        self.barrier.wait()
        return list(self.values)


class ThreadAccelerator:
    """What `Ranks` and the engine ask of accelerate."""

    def __init__(self, meeting: Meeting, number: int) -> None:
        self.meeting, self.process_index, self.num_processes = meeting, number, meeting.count
        self.device = torch.device("cpu")

    def reduce(self, values: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        return torch.stack(self.meeting.exchange(values)).sum(0)

    def prepare_model(self, model: nn.Module) -> nn.Module:
        """The ranks' models stay apart: what is tested here is not DDP."""
        return model

    def no_sync(self, model: nn.Module) -> nullcontext:
        return nullcontext()


@contextmanager
def collectives_of(meeting: Meeting) -> Iterator[None]:
    def broadcast_objects(values: list[Any]) -> None:
        values[:] = meeting.exchange(list(values))[0]

    def broadcast(values: Tensor, src: int) -> None:
        assert src == 0
        values.copy_(meeting.exchange(values.clone())[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "gather_object", lambda values: meeting.exchange(values[0]))
        patch.setattr(distributed, "broadcast_object_list", broadcast_objects)
        patch.setattr(torch.distributed, "broadcast", broadcast)
        yield


def on_ranks(count: int, work: Callable[[Ranks], T]) -> list[T | Exception]:
    """What `work` returned or raised on each of so many ranks at once."""
    meeting, ended = Meeting(count), dict[int, Any]()

    def one(number: int) -> None:
        meeting.here.number = number
        accelerator: Any = ThreadAccelerator(meeting, number)
        try:
            ended[number] = work(Ranks(accelerator))
        except Exception as error:
            ended[number] = error

    threads = [threading.Thread(target=one, args=(number,)) for number in range(count)]
    with collectives_of(meeting):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return [ended[number] for number in range(count)]


def all_returned(ended: list[T | Exception]) -> list[T]:
    """The same where no rank may have failed."""
    for outcome in ended:
        if isinstance(outcome, Exception):
            raise outcome
    return [outcome for outcome in ended if not isinstance(outcome, Exception)]
