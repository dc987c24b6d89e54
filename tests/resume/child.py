"""What a child process does: the benchmark on the tiny preset, with a signal at a chosen call of a
chosen function.

The file is imported by a fork server's children and started as a script by torchrun, with a job as
its JSON argument.
"""

import json
import os
import pkgutil
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any, Literal

WATCHED: tuple[str, ...] = (
    "mka.training.loop.take_step",
    "mka.training.checkpoint.save_file",
    "mka.training.checkpoint.write_json",
    "mka.training.checkpoint.remove",
    "mka.training.checkpoint.Checkpoints.export_weights",
    "mka.training.checkpoint.Checkpoints.clear",
    "mka.storage.sync_file",
    "mka.storage.sync_folder",
    "mka.storage.os.replace",
    "mka.experiments.benchmark.make_model",
    "mka.experiments.benchmark.evaluate",
    "mka.experiments.benchmark.write_curve",
    "mka.experiments.benchmark.append_result",
    "mka.experiments.folder.write_json",
    "mka.record.folders.write_manifest",
    "mka.record.folders.write_atomically",
    "mka.storage.replace_folder",
    "mka.record.results.write_all",
    "mka.report.result_lines",
    "mka.data.tokens.write_split",
    "mka.data.tokens.bytes_of_tokens",
)
CUT_AT = 500
"""Bytes that the next write still takes when a process is to die within it."""
Moment = Literal["before", "within", "after"]


@dataclass(frozen=True)
class Instant:
    """The `call`-th call of a function (1, 2, ...) on one rank. With `once`, a path, only where
    that is no file yet."""

    function: str
    call: int
    moment: Moment = "before"
    signals: tuple[int, ...] = (signal.SIGKILL,)
    rank: int = 0
    to_parent: bool = False
    once: str = ""

    def strike(self) -> None:
        for number in self.signals:
            if self.to_parent:
                tell_parent(number)
            else:
                os.kill(os.getpid(), number)


def tell_parent(number: int) -> None:
    """Send the parent a signal and wait until it has passed it on: the training is over too soon
    otherwise."""
    received: list[int] = []
    handler: Any = signal.getsignal(number)

    def receive(number: int, frame: Any) -> None:
        received.append(number)
        handler(number, frame)

    signal.signal(number, receive)
    os.kill(os.getppid(), number)
    while not received:
        time.sleep(0.01)
    signal.signal(number, handler)


@dataclass(frozen=True)
class Job:
    """One command: its arguments, the folder that its output and its token cache lie in, and what
    befalls it.

    `late_rank` takes two seconds longer than the others to come back when torchrun has restarted
    them."""

    home: str
    arguments: tuple[str, ...]
    instant: Instant | None = None
    defect: str = ""
    late_rank: int = -1

    @property
    def counts_path(self) -> Path:
        return Path(self.home) / "counts.json"


def to_json(job: Job) -> str:
    return json.dumps(asdict(job))


def from_json(text: str) -> Job:
    fields = json.loads(text)
    instant = fields["instant"] and Instant(
        **fields["instant"] | {"signals": tuple(fields["instant"]["signals"])}
    )
    return Job(**fields | {"instant": instant, "arguments": tuple(fields["arguments"])})


def replace_function(name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put `make(old)` in the place of a module's function or a class's method."""
    owner_name, _, attribute = name.rpartition(".")
    owner = pkgutil.resolve_name(owner_name)
    setattr(owner, attribute, make(getattr(owner, attribute)))


def cut_next_write(arguments: tuple[Any, ...]) -> None:
    """From here on the kernel ends this process in the middle of a write, as it does with a
    quota."""
    size = arguments[0].seek(0, os.SEEK_END) if hasattr(arguments[0], "seek") else 0
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(
        resource.RLIMIT_FSIZE, (size + CUT_AT, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
    )


def watch(name: str, counts: dict[str, int], instant: Instant | None) -> None:
    """Count the calls of a function, and let the instant's signals strike."""

    def make(function: Callable[..., Any]) -> Callable[..., Any]:
        calls = count(1)

        def watched(*arguments: Any, **named: Any) -> Any:
            number = counts[name] = next(calls)
            now = (
                instant.moment
                if instant and instant.function == name and instant.call == number
                else None
            )
            if instant and now == "before":
                instant.strike()
            if now == "within":
                cut_next_write(arguments)
            answer = function(*arguments, **named)
            if instant and now == "after":
                instant.strike()
            return answer

        return watched

    replace_function(name, make)


def armed(instant: Instant | None) -> Instant | None:
    """The instant, if it is this rank's and has not been yet."""
    if instant is None or instant.rank != int(os.environ.get("RANK", "0")):
        return None
    if instant.once:
        if Path(instant.once).exists():
            return None
        Path(instant.once).touch()
    return instant


def come_late(job: Job) -> None:
    restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if restarted and os.environ.get("RANK") == str(job.late_rank):
        time.sleep(2)


def carry_out(job: Job) -> int:
    """Run the command; returns its exit status. The first rank leaves the counts of calls
    behind."""
    import torch

    from mka import cli
    from mka.record.config import PRESETS
    from resume.defects import plant
    from tiny_runs import TINY

    come_late(job)
    torch.set_num_threads(1)
    os.environ["XDG_CACHE_HOME"] = str(Path(job.home) / "cache")
    PRESETS["tiny"] = TINY
    plant(job.defect)
    counts = dict.fromkeys(WATCHED, 0)
    instant = armed(job.instant)
    for name in WATCHED:
        watch(name, counts, instant)
    status = cli.bench([*job.arguments, "--output_dir", str(Path(job.home) / "run")])
    if os.environ.get("RANK", "0") == "0":
        job.counts_path.write_text(json.dumps(counts), encoding="utf-8")
    return status


def work(job: Job, environment: dict[str, str], log: str) -> None:
    """The target of a forked process: everything it prints goes into a file."""
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a fork server ignores it
    os.environ.update(environment)
    sys.exit(carry_out(job))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    sys.exit(carry_out(from_json(sys.argv[1])))
