"""Scripts on several ranks, started as a user starts them: by python, torchrun or deepspeed, on the
CPU alone."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from shutil import rmtree, which
from typing import Any

import psutil
import pytest

from mka.storage import locked
from tiny_runs import Ended

TESTS = Path(__file__).parent
COMMANDS = Path(sys.executable).parent
TIMEOUT = 240.0
"""Seconds after which a launch that hangs is ended; no test is about how long one takes."""
OURS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""Variables of another launch, which must not reach this one."""


@dataclass(frozen=True)
class Launch:
    """Where a job runs and what it is given besides its arguments."""

    folder: Path
    timeout: float = TIMEOUT
    environment: Mapping[str, str] | None = None

    def python(self, script: Path, *arguments: object) -> Ended:
        """One process, without a launcher."""
        return self.run([COMMANDS / "python", script, *arguments])

    def torchrun(self, ranks: int, script: Path, *arguments: object) -> Ended:
        port = f"--master_port={free_port()}"
        return self.run(
            [COMMANDS / "torchrun", f"--nproc_per_node={ranks}", port, script, *arguments]
        )

    def deepspeed(self, ranks: int, script: Path, *arguments: object) -> Ended:
        port = f"--master_port={free_port()}"
        return self.run([COMMANDS / "deepspeed", f"--num_gpus={ranks}", port, script, *arguments])

    def run(self, command: Sequence[object]) -> Ended:
        """How a command ended. Whatever is left of it is killed; fails with what it printed if it
        takes too long."""
        return self.run_together([command])[0]

    def run_together(self, commands: Sequence[Sequence[object]]) -> list[Ended]:
        """The same of several commands, at the same time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        outputs = [
            self.folder / f"{place}.{name}"
            for place in range(len(commands))
            for name in ("out", "err")
        ]
        jobs: list[psutil.Popen] = []
        try:
            for place, command in enumerate(commands):
                out, err = outputs[2 * place : 2 * place + 2]
                with out.open("wb") as stdout, err.open("wb") as stderr:
                    parts = [str(part) for part in command]
                    jobs.append(
                        psutil.Popen(
                            parts,
                            stdout=stdout,
                            stderr=stderr,
                            cwd=self.folder,
                            env=self.variables(),
                        )
                    )
            statuses = [job.wait(self.timeout) for job in jobs]
        except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
            said = "\n".join(
                f"{path.name}:\n{path.read_text(errors='replace')[-4000:]}" for path in outputs
            )
            pytest.fail(f"still running after {self.timeout} s: {commands}\n{said}", pytrace=False)
        finally:
            for job in jobs:
                kill_tree(job)
        texts = [path.read_text(encoding="utf-8") for path in outputs]
        return [
            Ended(status, *texts[2 * place : 2 * place + 2])
            for place, status in enumerate(statuses)
        ]

    def variables(self) -> dict[str, str]:
        """The environment of a job: one thread a rank, no GPU, no hub, and a token cache of its
        own."""
        kept = {name: value for name, value in os.environ.items() if name not in OURS}
        ours = {
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(TESTS),
            "TORCH_EXTENSIONS_DIR": str(extensions_folder()),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
        }
        return kept | ours | dict(self.environment or {})


def kill_tree(job: psutil.Popen) -> None:
    """End a job that still runs, with the ranks it started (torchrun gives each a session of its
    own)."""
    if not job.is_running():
        return
    for process in [*job.children(recursive=True), job]:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    job.wait()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def extensions_folder() -> Path:
    """Where torch keeps what DeepSpeed compiles at its first start, so that a private cache does
    not do it again."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "torch_extensions" / f"py{sys.version_info.major}{sys.version_info.minor}_cpu"


def missing_for_deepspeed() -> list[str]:
    """What its first start needs and is not there."""
    package = [] if find_spec("deepspeed") else ["the package deepspeed"]
    return package + [
        name
        for name in ("g++", "ninja")
        if which(name, path=f"{COMMANDS}:{os.environ['PATH']}") is None
    ]


NEEDS_DEEPSPEED = pytest.mark.skipif(
    bool(missing_for_deepspeed()),
    reason=f"DeepSpeed cannot start without {', '.join(missing_for_deepspeed())}",
)


def printed(ended: Ended) -> list[dict[str, Any]]:
    """The JSON lines that the ranks printed, of a job that went well."""
    assert ended.status == 0, ended.err[-4000:]
    return [json.loads(line) for line in ended.out.splitlines() if line.startswith("{")]


def own_lines(ended: Ended) -> list[str]:
    """What our command wrote to stderr, without the launchers' reports."""
    return [line for line in ended.err.splitlines() if line.startswith(("benchmark.py: ", "mka: "))]


Job = Callable[[Launch], Ended]


@dataclass(frozen=True)
class OneLaunchForMany:
    """Jobs that many tests look at: each runs once, also where the tests are spread over several
    workers."""

    folder: Path

    def __call__(self, name: str, job: Job, **changes: Any) -> Ended:
        """How the job of that name ended; its folder is `place(name)`."""
        with locked(self.folder / f"{name}.lock"):
            kept = self.folder / f"{name}.json"
            if not kept.is_file():
                rmtree(self.place(name), ignore_errors=True)  # of a worker in which it failed
                ended = job(Launch(self.place(name), **changes))
                kept.write_text(json.dumps([ended.status, ended.out, ended.err]), encoding="utf-8")
            return Ended(*json.loads(kept.read_text(encoding="utf-8")))

    def place(self, name: str) -> Path:
        return self.folder / name
