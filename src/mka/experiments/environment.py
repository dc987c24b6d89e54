"""What a result was measured on and by: software, processor and commit, how the run was
started, and what other processes did meanwhile."""

import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers

import mka
from mka.distributed import Ranks
from mka.errors import InputError
from mka.record.config import ResolvedConfig
from mka.training import deepspeed_settings

CPUINFO = Path("/proc/cpuinfo")


def describe_environment(device: torch.device, precision: str) -> dict[str, Any]:
    """Versions, processor, threads, precision and commit, ready for JSON."""
    return {
        "mka": mka.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "platform": platform.platform(),
        # Of the device that computes: the processor's name says little about a GPU's
        # times.
        "processor": torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device.type,
        "precision": precision,
        "commit": commit(),
    }


def processor_name() -> str:
    """The name of the CPU."""
    # Python's platform.processor is empty or just "x86_64" on most Linux systems.
    if CPUINFO.is_file():
        for line in CPUINFO.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of this source tree, with + for local changes; None outside a git
    checkout."""
    # Of the package's folder, not the current one, which may be another repository.
    folder = Path(__file__).parent
    try:
        git = ["git", "-C", str(folder), "describe", "--always", "--dirty=+", "--abbrev=12"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return None


def read_deepspeed(config: ResolvedConfig) -> dict[str, Any] | None:
    """DeepSpeed's settings; None if it is not used.

    Raises InputError, before the ranks meet, for a file or a start that cannot work.
    """
    if not config.deepspeed:
        return None
    settings = deepspeed_settings(config.deepspeed_config)
    if "RANK" not in os.environ:
        command = "deepspeed src/experiments/benchmark.py --deepspeed"
        raise InputError(f"--deepspeed needs a launcher; start it as {command}, or by torchrun")
    return settings


def describe_launch(
    config: ResolvedConfig, ranks: Ranks, parts: int, deepspeed: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What started the ranks, how many there are, and how they share the work, ready
    for JSON.

    parts: forward passes per optimizer step on each rank.
    """
    # torchrun does not say how many machines there are; each is assumed to have as many
    # ranks.
    machines = ranks.count // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", ranks.count)))
    return {
        "started_by": started_by(),
        "world_size": ranks.count,
        "machines": machines,
        "strategy": strategy_name(config, ranks, deepspeed),
        "gradient_accumulation_steps": parts,
        "gradient_checkpointing": config.gradient_checkpointing,
    }


def started_by() -> str:
    """The launcher of this process: torchrun, deepspeed or python."""
    # Each launcher leaves a variable of its own in the environment of what it starts.
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    return "deepspeed" if "CROSS_RANK" in os.environ else "python"


def strategy_name(config: ResolvedConfig, ranks: Ranks, deepspeed: dict[str, Any] | None) -> str:
    """How the ranks share the work: deepspeed zero1 to zero3, ddp, fsdp or one
    process."""
    if deepspeed is not None:
        return f"deepspeed zero{deepspeed['zero_optimization']['stage']}"
    return config.strategy if ranks.count > 1 else "one process"


def accumulation(global_batch_size: int, batch_size: int, num_ranks: int) -> int:
    """Forward passes per step on each rank: as few as possible, of at most `batch_size`
    rows each.

    All have the same number of rows. Raises InputError if the ranks cannot take equal
    shares.
    """
    # Unequal shares would weight rows differently, because ranks average their
    # gradients.
    if global_batch_size % num_ranks:
        allowed = [
            str(ranks)
            for ranks in range(1, global_batch_size + 1)
            if global_batch_size % ranks == 0
        ]
        raise InputError(
            f"{num_ranks} ranks do not divide the global batch of {global_batch_size} rows that "
            f"this run was started with; allowed: {', '.join(allowed)}"
        )
    share = global_batch_size // num_ranks
    return next(
        parts
        for parts in range(1, share + 1)
        if share % parts == 0 and share // parts <= batch_size
    )


class Neighbors:
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
