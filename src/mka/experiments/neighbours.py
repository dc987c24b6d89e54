"""How busy other processes kept the machine meanwhile: what makes a measured time worth less."""

import os
import time

import psutil

from mka.distributed import Ranks


class Neighbours:
    """Cores that processes other than the ranks of this run keep busy, the mean since it was made. Collective."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.before = self.seconds()

    def seconds(self) -> tuple[float, float]:
        """Processor time that was not this run's, on this machine, and the time on the clock."""
        times, own = psutil.cpu_times(), psutil.Process().cpu_times()
        busy = sum(times) - times.idle - getattr(times, "iowait", 0) - getattr(times, "guest", 0)
        ours = sum(self.ranks.gather(own.user + own.system))
        return busy - ours, time.perf_counter()

    def busy_cores(self) -> float | None:
        """None over several machines, of which this process sees one."""
        (others, now), (others_before, then) = self.seconds(), self.before
        if int(os.environ.get("LOCAL_WORLD_SIZE", self.ranks.count)) != self.ranks.count:
            return None
        return round(max(0.0, (others - others_before) / (now - then)), 3)
