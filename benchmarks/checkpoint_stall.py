"""How long a checkpoint stops a training, against the time the disk needs for its bytes.

    python benchmarks/checkpoint_stall.py --folder runs/stall

The gpt2 preset with mha: weights and AdamW's moments, float32. In each turn the same number of bytes is written plainly
(one file, fsync) and the checkpoint is saved; the figure is the median of the ratios. One line of JSON last.
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

from mka.config import PRESETS
from mka.distributed import Ranks
from mka.models import build_model, preset_config
from mka.training import Checkpoint, Checkpoints, choose_precision
from mka.training.engine import TorchEngine

GPT2 = PRESETS["gpt2"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """Where to write, and how often."""

    folder: Path
    """On the disk to measure; removed at the end."""
    turns: int = 5


def main(options: Options) -> None:
    model = build_model(preset_config(GPT2), "mha")
    engine = TorchEngine(model, GPT2.learning_rate, choose_precision(torch.device("cpu")), Ranks())
    engine.gradients([torch.zeros((1, 9), dtype=torch.long)])
    engine.step(GPT2.learning_rate)
    checkpoints = Checkpoints(options.folder / "checkpoints", {}, keep=1)
    stalls, plain, size = [], [], 0
    for turn in range(options.turns):
        started = time.perf_counter()
        weights, moments, rest = engine.state()
        checkpoints.save(Checkpoint(turn, weights, moments, {"engine": rest}))
        stalls.append(time.perf_counter() - started)
        files = (options.folder / "checkpoints").rglob("*")
        size = sum(path.stat().st_size for path in files if path.is_file())
        plain.append(write_plainly(options.folder / "plain", bytes(2**20), size))
    shutil.rmtree(options.folder)
    ratio = median(s / p for s, p in zip(stalls, plain, strict=True))
    print(f"{size / 2**20:,.0f} MiB: stall {median(stalls):.2f} s, the disk alone {median(plain):.2f} s: {ratio:.2f}")
    print(json.dumps({"ratio": ratio, "stall_seconds": stalls, "disk_seconds": plain, "bytes": size}))


def write_plainly(path: Path, block: bytes, size: int) -> float:
    started = time.perf_counter()
    with path.open("wb", buffering=0) as file:
        for _ in range(size // len(block)):
            file.write(block)
        os.fsync(file.fileno())
    seconds = time.perf_counter() - started
    path.unlink()
    return seconds


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
