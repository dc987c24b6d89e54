"""The benchmark's command on two ranks: one voice, the same files and numbers as from one
process."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from checks import RELATIVE_RMS, TOLERANCE
from launch import NEEDS_DEEPSPEED, Launch, OneLaunchForMany
from mka.record.results import Result, read_results
from tiny_runs import Ended

COMMAND = Path(__file__).parent / "command.py"
CONFIGS = Path(__file__).parents[2] / "configs"
OPTIONS = (
    "--preset",
    "tiny",
    "--dataset",
    "text",
    "--attention_type",
    "mka",
    "--max_steps",
    6,
    "--output_dir",
    "run",
)
FLOAT32 = {"FLOAT32": "1"}
PYTHON = ("--batch_size", 2, "--gradient_accumulation_steps", 2)
LAUNCHES: dict[str, tuple[Any, ...]] = {
    "ddp": ("--batch_size", 2),
    "fsdp": ("--batch_size", 2, "--strategy", "fsdp"),
    "fp16": ("--batch_size", 2, "--fp16"),
}
BY_DEEPSPEED: dict[str, tuple[Any, ...]] = {
    "zero2": ("--batch_size", 2, "--deepspeed"),
    "zero1": (
        "--batch_size",
        2,
        "--deepspeed",
        "--deepspeed_config",
        CONFIGS / "ds_config_zero1.json",
    ),
    "zero3": (
        "--batch_size",
        2,
        "--deepspeed",
        "--deepspeed_config",
        CONFIGS / "ds_config_zero3.json",
    ),
}


@pytest.fixture(scope="session")
def alone(launched: OneLaunchForMany, corpus: Path) -> tuple[Ended, Path]:
    """One process, two parts a step."""

    def job(at: Launch) -> Ended:
        return at.python(COMMAND, *OPTIONS, "--text_path", corpus, *PYTHON)

    ended = launched("alone", job, environment=FLOAT32)
    return ended, launched.place("alone") / "run"


def on_two_ranks(name: str, launched: OneLaunchForMany, corpus: Path) -> tuple[Ended, Path]:
    options = (*OPTIONS, "--text_path", corpus)

    def job(at: Launch) -> Ended:
        if name in LAUNCHES:
            return at.torchrun(2, COMMAND, *options, *LAUNCHES[name])
        return at.deepspeed(2, COMMAND, *options, *BY_DEEPSPEED[name])

    return launched(f"two-{name}", job, environment=FLOAT32), launched.place(f"two-{name}") / "run"


NAMES = [
    pytest.param(name, marks=[] if name in ("ddp", "fsdp") else pytest.mark.slow)
    for name in LAUNCHES
]
NAMES += [pytest.param(name, marks=[pytest.mark.slow, NEEDS_DEEPSPEED]) for name in BY_DEEPSPEED]


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_report_what_one_does(
    name: str, alone: tuple[Ended, Path], launched: OneLaunchForMany, corpus: Path
) -> None:
    ended, folder = on_two_ranks(name, launched, corpus)
    assert ended.status == 0, ended.err
    assert alone[0].status == 0, alone[0].err
    (one,), (two,) = read_results(alone[1]), read_results(folder)
    tolerance = RELATIVE_RMS[torch.bfloat16] if name == "fp16" else TOLERANCE[torch.float32]
    for field in ("train_loss", "eval_loss", "bits_per_byte"):
        assert getattr(two, field) == pytest.approx(getattr(one, field), rel=tolerance), field
    for field in ("parameters", "cache_bytes_per_token", "train_tokens", "eval_tokens"):
        assert getattr(two, field) == getattr(one, field), field
    check_launch(one, two, name)


def check_launch(one: Result, two: Result, name: str) -> None:
    assert (one.environment["launch"]["world_size"], one.environment["launch"]["started_by"]) == (
        1,
        "python",
    )
    launch = two.environment["launch"]
    assert (launch["world_size"], launch["machines"], launch["gradient_accumulation_steps"]) == (
        2,
        1,
        1,
    )
    assert launch["strategy"] == {"fp16": "ddp"}.get(
        name, f"deepspeed {name}" if name in BY_DEEPSPEED else name
    )
    assert launch["started_by"] == ("deepspeed" if name in BY_DEEPSPEED else "torchrun")


@pytest.mark.parametrize("name", NAMES)
def test_one_voice_and_the_same_files(
    name: str, alone: tuple[Ended, Path], launched: OneLaunchForMany, corpus: Path
) -> None:
    ended, folder = on_two_ranks(name, launched, corpus)
    ours = [line for line in ended.out.splitlines() if line.strip()]
    assert len(set(ours)) == len(ours)
    assert len([line for line in ours if line.startswith("🏁 Testing MKA")]) == 1
    assert len([line for line in ours if line.startswith("📊 Results for MKA")]) == 1
    assert len([line for line in ours if "step 6/6" in line]) == 1
    assert len([line for line in ours if line.startswith("Ranks      2 on 1 machine(s)")]) == 1
    assert "Traceback" not in ended.out + ended.err
    assert "Warning:" not in ended.out + ended.err
    assert files(folder) == files(alone[1])
    assert len((folder / "results.jsonl").read_text(encoding="utf-8").splitlines()) == 1
    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert described["global_batch_size"] == 4


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
