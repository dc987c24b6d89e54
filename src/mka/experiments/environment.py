"""What a result was measured on: software, processor and commit."""

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import transformers

import mka

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
