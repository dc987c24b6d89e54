"""Runs in a folder of their own, interrupted and gone on with, and what is left of them in the
end."""

import json
import multiprocessing
import signal
from collections.abc import Mapping
from dataclasses import dataclass, replace
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from launch import COMMANDS, Launch
from mka.record.folders import ALTERED, MISSING
from mka.record.results import RunFolder, read_results
from mka.record.verify import all_states
from resume import child
from resume.child import Instant, Job
from tiny_runs import fingerprint

PRELOADED = [
    "resume.child",
    "resume.defects",
    "mka.cli",
    "mka.experiments",
    "tiny_runs",
    "torch",
    "transformers",
]
PRELOADED += ["accelerate", "tokenizers", "vl_convert", "pytest"]
ARGUMENTS = (
    "--preset",
    "tiny",
    "--attention_type",
    "mha",
    "fmka",
    "--local_window",
    "8",
    "--chunk_size",
    "4",
)
ARGUMENTS += (
    "--top_k",
    "2",
    "--max_steps",
    "12",
    "--save_steps",
    "3",
    "--keep_checkpoints",
    "2",
    "--dataset",
    "text",
)
MEASURED = {
    *("train_seconds", "eval_seconds", "tokens_per_second"),
    *("memory_allocated", "memory_reserved", "busy_cores", "environment", "checksum"),
}
"""Fields of a result that no two runs share."""
PATIENCE = 180
"""Seconds after which a run that does not end is a failure."""
FORKS = multiprocessing.get_context("forkserver")


def start_fork_server() -> None:
    """One process loads torch, once; each run is a fork of it."""
    FORKS.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        forkserver.ensure_running()


@dataclass(frozen=True)
class Ended:
    """Exit status of each rank, or of torchrun; negative for a signal; and everything they
    printed."""

    statuses: list[int]
    printed: str

    @property
    def struck(self) -> bool:
        """Whether a process ended by a signal that leaves no time for anything."""
        return any(status in (-signal.SIGKILL, -signal.SIGXFSZ) for status in self.statuses)


@dataclass(frozen=True)
class Outcome:
    """What has to be the same however often a run was interrupted."""

    weights: dict[str, str]
    results: list[dict[str, Any]]
    curves: dict[str, list[dict[str, Any]]]
    tokens: dict[str, str]


@dataclass(frozen=True)
class Case:
    """One comparison in its own folder with its own token cache, started as often as it takes."""

    home: Path
    corpus: Path
    ranks: int = 1

    @property
    def folder(self) -> Path:
        return self.home / "run"

    def job(self, instant: Instant | None = None, defect: str = "") -> Job:
        arguments = (*ARGUMENTS, "--text_path", str(self.corpus))
        return Job(home=str(self.home), arguments=arguments, instant=instant, defect=defect)

    def start(self, instant: Instant | None = None, defect: str = "") -> Ended:
        """Give the command; returns when all of its ranks have ended."""
        self.home.mkdir(parents=True, exist_ok=True)
        job = self.job(instant, defect)
        job.counts_path.unlink(missing_ok=True)
        store = (
            TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
            if self.ranks > 1
            else None
        )
        logs = [self.home / f"log{rank}.txt" for rank in range(self.ranks)]
        environments = [
            {} if store is None else place_of(rank, self.ranks, store.port)
            for rank in range(self.ranks)
        ]
        processes = [
            FORKS.Process(target=child.work, args=(job, environment, str(log)), daemon=True)
            for environment, log in zip(environments, logs, strict=True)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(PATIENCE)
        late = [process for process in processes if process.exitcode is None]
        for process in late:
            process.kill()
            process.join()
        printed = "".join(log.read_text(encoding="utf-8") for log in logs)
        assert not late, f"a run did not end:\n{printed}"
        return Ended([process.exitcode or 0 for process in processes], printed)

    def torchrun(
        self, instant: Instant | None = None, late_rank: int = -1, restarts: int = 0
    ) -> Ended:
        """The same by the real launcher; the status is that of torchrun."""
        job = replace(self.job(instant), late_rank=late_rank)
        job = replace(job, arguments=(*job.arguments, "--ddp_timeout", "20"))
        command = [COMMANDS / "torchrun", "--standalone", f"--nproc_per_node={self.ranks}"]
        command += [f"--max-restarts={restarts}", child.__file__, child.to_json(job)]
        ended = Launch(self.home, PATIENCE, {}).run(command)
        return Ended([ended.status], ended.out + ended.err)

    def calls(self) -> dict[str, int]:
        """How often the last command, which was not killed, called each watched function."""
        return json.loads(self.job().counts_path.read_text(encoding="utf-8"))

    def finished(self) -> list[str]:
        """Mechanisms that have their result."""
        there = RunFolder(self.folder).results.is_file()
        return [result.attention_type for result in read_results(self.folder)] if there else []

    def checkpoints(self, kind: str) -> list[int]:
        """Steps of a training's checkpoints, ascending."""
        return sorted(
            int(path.name[5:])
            for path in (self.folder / "checkpoints" / f"{kind}-seed0").glob("step-*")
        )

    def outcome(self) -> Outcome:
        rows = [
            json.loads(line)
            for line in RunFolder(self.folder).results.read_bytes().split(b"\n")
            if is_json(line)
        ]
        curves = {
            path.name: [
                without(json.loads(line), {"seconds"})
                for line in path.read_text("utf-8").splitlines()
            ]
            for path in (self.folder / "curves").glob("*.jsonl")
        }
        return Outcome(
            weights=fingerprint(self.folder / "models"),
            results=[without(row, MEASURED) for row in rows],
            curves=curves,
            tokens=visible(fingerprint(self.home / "cache" / "mka")),
        )

    def left_over(self) -> set[str]:
        """What lies in the folder although all is finished: checkpoints, temporary files; not the
        lock."""
        names = set(fingerprint(self.folder)) - {".lock"}
        return {name for name in names if name.startswith("checkpoints") or is_hidden(name)}

    def altered(self) -> list[str]:
        """What is not as its manifest says; a checkpoint that was being removed does not count."""
        found = all_states(self.folder)
        return [
            name
            for name, state in found
            if state in (ALTERED, MISSING) and not name.startswith("checkpoints/")
        ]

    def go_on(self, defect: str = "") -> Ended:
        """Give the command to the end: it may not complain, nor do again what is finished."""
        finished = self.finished()
        ended = self.start(defect=defect)
        assert ended.statuses == [0] * self.ranks, ended.printed
        assert "Traceback" not in ended.printed, ended.printed
        for kind in ("mha", "fmka"):
            assert (f"✅ {kind.upper()} with seed 0 is already in" in ended.printed) == (
                kind in finished
            )
        return ended


def place_of(rank: int, count: int, port: int) -> dict[str, str]:
    """What torchrun tells a process: who it is, and where the ranks meet."""
    names = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "GROUP_RANK": 0,
    }
    store = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "forks"}
    store |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": 0}
    return {name: str(value) for name, value in (names | store).items()}


def is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def without(values: Mapping[str, Any], names: set[str]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}


def is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in Path(name).parts)


def visible(found: dict[str, str]) -> dict[str, str]:
    """Without what a kill may leave beside the files, and the lock."""
    return {name: value for name, value in found.items() if not is_hidden(name)}
