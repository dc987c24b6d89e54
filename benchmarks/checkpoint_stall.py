"""How long a checkpoint stops a training, compared with the time the disk needs for its bytes.

    python benchmarks/checkpoint_stall.py --folder runs/stall

The checkpoint is that of the gpt2 preset with mha: weights and AdamW's moments in float32. Each
turn saves it, then writes the same number of bytes plainly (one file, fsync); the result is the
median of the ratios. The last line is JSON.
"""

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
import tyro

from mka.distributed import Ranks
from mka.models import build_model, preset_config
from mka.record.config import PRESETS
from mka.training import Checkpoint, Checkpoints, choose_precision
from mka.training.engine import TorchEngine

GPT2 = PRESETS["gpt2"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where to write, and how often."""

    folder: Path
    """Folder to write to, on the disk to measure; it is removed at the end."""
    turns: int = 5
    """Number of turns."""


def main(options: Options) -> None:
    """Measure both, and print their medians and the ratio."""
    model = build_model(preset_config(GPT2), "mha")
    engine = TorchEngine(model, GPT2.learning_rate, choose_precision(torch.device("cpu")), Ranks())
    # One step, after which AdamW has its moments: two thirds of a checkpoint.
    engine.gradients([torch.zeros((1, 9), dtype=torch.long)])
    engine.step(GPT2.learning_rate)
    checkpoints = Checkpoints(options.folder / "checkpoints", {}, keep=1)
    stalls, plain, size = [], [], 0
    for turn in range(options.turns):
        # Collecting the state stops the training as well as writing it does.
        started = time.perf_counter()
        weights, moments, rest = engine.state()
        checkpoints.save(Checkpoint(turn, weights, moments, {"engine": rest}))
        stalls.append(time.perf_counter() - started)
        files = (options.folder / "checkpoints").rglob("*")
        size = sum(path.stat().st_size for path in files if path.is_file())
        plain.append(write_plainly(options.folder / "plain", bytes(2**20), size))
    shutil.rmtree(options.folder)
    # Turn by turn, because the speed of a disk that others use changes over time.
    ratio = median(s / p for s, p in zip(stalls, plain, strict=True))
    print(
        f"{size / 2**20:,.0f} MiB: stall {median(stalls):.2f} s, the disk alone "
        f"{median(plain):.2f} s: {ratio:.2f}"
    )
    print(
        json.dumps({"ratio": ratio, "stall_seconds": stalls, "disk_seconds": plain, "bytes": size})
    )


def write_plainly(path: Path, block: bytes, size: int) -> float:
    """The time to write `size` bytes to one file and fsync it, in seconds."""
    started = time.perf_counter()
    # Without Python's buffer, which would copy every byte once more.
    with path.open("wb", buffering=0) as file:
        for _ in range(size // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
