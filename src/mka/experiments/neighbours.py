"""CPU load from other processes during the run."""

import os
import time

import psutil

from mka.distributed import Ranks


class Neighbours:
    """Measures how many cores other processes keep busy, from its creation on.
    Collective.

    Other processes are those that are not ranks of this run.
    """

    def __init__(self, ranks: Ranks) -> None:
        # All ranks must create it together, because `seconds` gathers from all of them.
        self.ranks = ranks
        self.before = self.seconds()

    def seconds(self) -> tuple[float, float]:
        """CPU seconds of this machine that other processes used, and the time on the
        clock."""
        times, own = psutil.cpu_times(), psutil.Process().cpu_times()
        # Time waiting for a disk leaves the core free; a guest's time is in the user's
        # too.
        busy = sum(times) - times.idle - getattr(times, "iowait", 0) - getattr(times, "guest", 0)
        ours = sum(self.ranks.gather(own.user + own.system))
        return busy - ours, time.perf_counter()

    def busy_cores(self) -> float | None:
        """The mean number of cores that others kept busy; None if the run spans
        machines."""
        # A process sees the load of its own machine only. Asked after `seconds`, in
        # which all ranks take part.
        (others, now), (others_before, then) = self.seconds(), self.before
        if int(os.environ.get("LOCAL_WORLD_SIZE", self.ranks.count)) != self.ranks.count:
            return None
        return round(max(0.0, (others - others_before) / (now - then)), 3)
