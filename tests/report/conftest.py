"""Results and run folders made up from a seed."""

import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from mka.record.mechanisms import MECHANISMS
from mka.record.results import (
    Cost,
    CurvePoint,
    Result,
    Routing,
    append_result,
    write_costs,
    write_curve,
    write_routing,
)

MakeResult = Callable[..., Result]
FillFolder = Callable[..., Path]


def build_result(kind: str = "mka", seed: int = 0, **changes: Any) -> Result:
    noise = random.Random(f"{kind} {seed}")
    order = list(MECHANISMS).index(kind) if kind in MECHANISMS else 0
    loss = 4.5 + 0.02 * order + noise.gauss(0, 0.01)
    values: dict[str, Any] = {
        "attention_type": kind,
        "seed": seed,
        "train_loss": loss + 0.05,
        "eval_loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_byte": 0.42 * loss,
        "eval_block_losses": [loss + 0.1 * math.sin(block) for block in range(20)],
        "train_seconds": 60.0 + 10 * order + noise.random(),
        "eval_seconds": 5.0 + noise.random(),
        "tokens_per_second": 4000.0 - 100 * order,
        "memory_allocated": 300 * 2**20 + order * 2**20,
        "memory_reserved": None,
        "parameters": 5_273_344,
        "cache_bytes_per_token": 4096.0 / 2 ** (order % 4),
        "flops_per_token": 12_345_678.0,
        "train_tokens": 245_760,
        "eval_tokens": 32_768,
        "skipped_steps": 0,
        "config": {
            "preset": "quick",
            "dataset": "stdlib",
            "seeds": [0],
            "output_dir": "somewhere",
            "text_path": [],
            "data": {"fingerprint": "ab12"},
            "model": {"hidden_size": 256},
        },
        "environment": {"python": "3.11.9", "device": "cpu", "threads": 2},
    }
    return Result(**values | changes)


def build_curve(result: Result, num_steps: int = 40) -> list[CurvePoint]:
    noise = random.Random(f"curve {result.key}")
    points = []
    for step in range(1, num_steps + 1):
        loss = result.eval_loss + 4 * math.exp(-step / 6)
        points.append(
            CurvePoint(
                step=step,
                tokens=2048 * step,
                seconds=result.train_seconds * step / num_steps,
                train_loss=loss + noise.gauss(0, 0.1),
                eval_loss=loss if step % 10 == 0 else None,
            )
        )
    return points


def build_costs(kinds: Sequence[str]) -> list[Cost]:
    return [
        Cost(
            name=kind,
            tokens=512 * 2**power,
            milliseconds=round(1.5 * 2**power * (1 + number), 4),
            state_bytes=2**power * (4096 + 512 * number),
            flops_per_token=1000 * 2**power,
        )
        for power in range(3)
        for number, kind in enumerate(kinds)
    ]


def build_routing(
    kind: str, seed: int, words: Sequence[str] = ("def ", "<b>", "\n", "x & y", "|")
) -> Routing:
    noise = random.Random(f"routing {kind} {seed}")

    def shares() -> list[float]:
        parts = [noise.random() for _ in range(3)]
        return [round(part / sum(parts), 4) for part in parts]

    return Routing(
        name=kind,
        seed=seed,
        edges=[0, 4, 8, 12],
        shares=[[shares() for _ in range(3)] for _ in range(2)],
        entropy=[0.9, 0.8],
        text=list(words) * 3,
        served=[shares() for _ in range(3 * len(words))],
    )


@pytest.fixture
def make_result() -> MakeResult:
    return build_result


@pytest.fixture
def fill_folder(tmp_path: Path) -> FillFolder:
    """Fill a folder with results and curves of some mechanisms (all) and seeds (one)."""

    def fill(
        name: str = "run",
        kinds: Sequence[str] = tuple(MECHANISMS),
        seeds: Sequence[int] = (0,),
        **changes: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for result in [build_result(kind, seed, **changes) for seed in seeds for kind in kinds]:
            append_result(folder, result)
            write_curve(folder, *result.key, build_curve(result))
        return folder

    return fill


@pytest.fixture
def full_folder(fill_folder: FillFolder) -> FillFolder:
    """The same with costs and routings."""

    def fill(
        name: str = "run", kinds: Sequence[str] = tuple(MECHANISMS), seeds: Sequence[int] = (0,)
    ) -> Path:
        folder = fill_folder(name, kinds, seeds)
        write_costs(folder, build_costs(kinds))
        for kind in set(kinds) & {"mka", "fmka"}:
            for seed in seeds:
                write_routing(folder, build_routing(kind, seed))
        return folder

    return fill
