"""The same command on another number of ranks goes on from the checkpoint, with the same global
batches."""

from pathlib import Path

import pytest
import torch

from checks import TOLERANCE
from launch import NEEDS_DEEPSPEED, Launch
from mka.record.results import read_curve
from tiny_runs import Ended

COMMAND = Path(__file__).parent / "command.py"
STEPS, SAVED, KILLED = 12, 4, 6


def start(
    folder: Path, corpus: Path, ranks: int, killed_at: int | None = None, *options: object
) -> Ended:
    fault = (
        {}
        if killed_at is None
        else {"FAULT": "killed", "FAULTY_RANK": "all", "FAULTY_STEP": str(killed_at)}
    )
    environment = {"FLOAT32": "1", **fault}
    at = Launch(folder, environment=environment)
    arguments = [
        "--preset",
        "tiny",
        "--dataset",
        "text",
        "--text_path",
        corpus,
        "--attention_type",
        "fmka",
    ]
    arguments += [
        "--max_steps",
        STEPS,
        "--batch_size",
        4,
        "--save_steps",
        SAVED,
        "--output_dir",
        folder / "run",
    ]
    if ranks == 1:
        return at.python(COMMAND, *arguments, *options)
    return at.torchrun(ranks, COMMAND, *arguments, *options)


def losses(folder: Path) -> list[float]:
    return [
        point.train_loss
        for point in read_curve(folder / "run", "fmka", 0)
        if point.train_loss is not None
    ]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> list[float]:
    folder = tmp_path_factory.mktemp("whole")
    ended = start(folder, corpus, 1)
    assert ended.status == 0, ended.err
    return losses(folder)


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        pytest.param(2, (), id="ddp on 2"),
        pytest.param(4, (), id="ddp on 4", marks=pytest.mark.slow),
        pytest.param(2, ("--strategy", "fsdp"), id="fsdp on 2", marks=pytest.mark.slow),
        pytest.param(
            2, ("--deepspeed",), id="zero2 on 2", marks=[pytest.mark.slow, NEEDS_DEEPSPEED]
        ),
    ],
)
def test_from_one_rank_to_several(
    whole: list[float], tmp_path: Path, corpus: Path, ranks: int, options: tuple[object, ...]
) -> None:
    assert start(tmp_path, corpus, 1, KILLED).status == -9
    ended = start(tmp_path, corpus, ranks, None, *options)
    assert ended.status == 0, ended.err
    assert f"Resuming after step {SAVED} of {STEPS}" in ended.out
    assert f"{ranks} on 1 machine(s)" in ended.out
    assert "4 rows per step" in ended.out
    assert losses(tmp_path) == pytest.approx(whole, rel=TOLERANCE[torch.float32])


@pytest.mark.slow
def test_from_several_ranks_to_one(whole: list[float], tmp_path: Path, corpus: Path) -> None:
    """Two ranks started with 2 rows each; one goes on with --batch_size 2, in two parts."""
    two = ("--batch_size", 2)
    assert start(tmp_path, corpus, 2, KILLED, *two).status == 1
    ended = start(tmp_path, corpus, 1, None, *two)
    assert ended.status == 0, ended.err
    assert f"Resuming after step {SAVED} of {STEPS}" in ended.out
    assert losses(tmp_path) == pytest.approx(whole, rel=TOLERANCE[torch.float32])


@pytest.mark.slow
@NEEDS_DEEPSPEED
def test_from_strategy_to_strategy(whole: list[float], tmp_path: Path, corpus: Path) -> None:
    """One checkpoint passes through ddp, fsdp and ZeRO 2 on two ranks, and then to one process."""
    two = ("--batch_size", 2, "--save_steps", 3)
    turns = [(2, 4, ()), (2, 7, ("--strategy", "fsdp")), (2, 11, ("--deepspeed",)), (1, None, ())]
    said = [
        start(tmp_path, corpus, ranks, killed_at, *two, *options)
        for ranks, killed_at, options in turns
    ]
    assert [ended.status for ended in said] == [1, 1, 1, 0], said[-1].err
    for after, ended in zip((3, 6, 9), said[1:], strict=True):
        assert f"Resuming after step {after} of {STEPS}" in ended.out
    assert losses(tmp_path) == pytest.approx(whole, rel=TOLERANCE[torch.float32])
