"""SIGTERM and Ctrl-C during a training: finish the step, save, and only then stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """The training stopped at a signal, after its checkpoint was written."""

    def __init__(self, signal_number: int, where: str) -> None:
        super().__init__(where)
        self.signal_number = signal_number


class StopRequest:
    """Remembers a signal. A second Ctrl-C does not wait any longer."""

    signal_number: int = 0

    def got(self, number: int) -> bool:
        return self.signal_number == number

    def receive(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = self.signal_number or number


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Within the block SIGTERM and SIGINT only set the request. Threads other than the main one get no signals."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.receive) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
