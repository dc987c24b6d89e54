"""SIGTERM and Ctrl-C during a training: finish the step, save, and only then stop."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """The training stopped because of a signal, after its checkpoint was written."""

    def __init__(self, signal_number: int, where: str) -> None:
        super().__init__(where)
        self.signal_number = signal_number


class StopRequest:
    """Remembers the first signal. A second Ctrl-C stops at once instead of after the
    step."""

    signal_number: int = 0

    def got(self, number: int) -> bool:
        """Whether the remembered signal has this number."""
        return self.signal_number == number

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """Remember a signal; this is a signal handler. A second Ctrl-C raises
        KeyboardInterrupt."""
        if self.signal_number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = self.signal_number or number


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """Within the block, SIGTERM and SIGINT only set the request."""
    request = StopRequest()
    # Python delivers signals to the main thread, and only there may handlers be set.
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    # Set back afterwards: outside of a training, Ctrl-C stops at once as usual.
    before = {
        number: signal.signal(number, request.receive) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
