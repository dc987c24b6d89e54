"""Processor time that was not this run's."""

from collections import namedtuple

import pytest

from mka.distributed import Ranks
from mka.experiments import environment
from mka.experiments.environment import Neighbors

Times = namedtuple("Times", "user system idle iowait guest")
Own = namedtuple("Own", "user system")


class Machine:
    """As psutil and the clock show it: `others` cores' work beside this process's own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clock, self.own, self.others = 100.0, 7.0, 50.0
        monkeypatch.setattr(
            environment.psutil, "cpu_times", lambda: Times(self.others, self.own, 900.0, 30.0, 0.0)
        )
        monkeypatch.setattr(environment.psutil, "Process", lambda: self)
        monkeypatch.setattr(environment.time, "perf_counter", lambda: self.clock)

    def cpu_times(self) -> Own:
        return Own(self.own, 0.0)


def test_only_the_time_of_others_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    meter = Neighbors(Ranks())
    machine.clock, machine.own, machine.others = 110.0, 27.0, 65.0
    assert meter.busy_cores() == 1.5


def test_never_below_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    meter = Neighbors(Ranks())
    machine.clock, machine.others = 110.0, 49.0
    assert meter.busy_cores() == 0.0


def test_unknown_over_several_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    meter = Neighbors(Ranks())
    machine.clock = 110.0
    assert meter.busy_cores() is None
