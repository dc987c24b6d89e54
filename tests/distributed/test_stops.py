"""It stops rather than lies: one faulty rank ends the whole job, and what is said names the
reason."""

from pathlib import Path

import pytest

from launch import Launch, own_lines
from tiny_runs import Ended

COMMAND = Path(__file__).parent / "command.py"
OPTIONS = ("--preset", "tiny", "--dataset", "text", "--attention_type", "mha", "--max_steps", 8)


def faulty(
    folder: Path, corpus: Path, fault: str, rank: str, step: int = 3, *options: object
) -> Ended:
    environment = {"FAULT": fault, "FAULTY_RANK": rank, "FAULTY_STEP": str(step)}
    at = Launch(folder, environment=environment)
    return at.torchrun(
        2, COMMAND, *OPTIONS, "--text_path", corpus, "--output_dir", folder / "run", *options
    )


def test_ranks_that_differ_stop_before_the_first_step(tmp_path: Path, corpus: Path) -> None:
    ended = faulty(tmp_path, corpus, "other settings", "1")
    assert ended.status == 1  # torchrun's own; that of the workers is in its report
    assert "exitcode  : 2" in ended.err
    assert own_lines(ended) == [
        "benchmark.py: the ranks differ: learning_rate is 0.003 on rank 0 and 0.5 on rank 1; "
        "start all with the same "
        "command"
    ]
    assert "step" not in ended.out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("rank", ["0", pytest.param("1", marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_on_one_rank_stops_all(
    tmp_path: Path, corpus: Path, rank: str
) -> None:
    ended = faulty(tmp_path, corpus, "nan", rank)
    assert ended.status == 1
    (line,) = own_lines(ended)
    assert line.startswith(
        "mka: mha, seed 0: the loss at step 4 is nan; the first layer whose output is not "
        "finite is "
    )
    assert f"transformer.h.1.mlp.c_fc (rank {rank}); try " in line
    assert "step 4/8" not in ended.out
    assert not (tmp_path / "run" / "results.jsonl").exists()


def test_a_rank_that_is_killed_ends_the_job(tmp_path: Path, corpus: Path) -> None:
    """The survivor says why, unless torchrun was quicker to end it; torchrun names the rank and the
    signal."""
    ended = faulty(tmp_path, corpus, "killed", "1")
    assert ended.status == 1
    assert "exitcode  : -9" in ended.err
    assert "src/mka/" not in ended.err  # no traceback of ours
    for line in own_lines(ended):
        assert line.startswith("mka: rank 0: lost another rank at step 4: ")


@pytest.mark.slow
def test_a_rank_that_does_not_answer_ends_the_job_within_the_timeout(
    tmp_path: Path, corpus: Path
) -> None:
    ended = faulty(tmp_path, corpus, "hangs", "1", 3, "--ddp_timeout", 10)
    assert ended.status == 1
    (line,) = own_lines(ended)
    assert line.startswith("mka: rank 0: lost another rank at step 4: ")


def test_ranks_that_do_not_divide_the_global_batch_are_refused(
    tmp_path: Path, corpus: Path
) -> None:
    options = (*OPTIONS, "--text_path", corpus, "--output_dir", tmp_path / "run", "--batch_size", 4)
    alone = {"FAULT": "killed", "FAULTY_RANK": "0", "FAULTY_STEP": "5"}
    assert (
        Launch(tmp_path, environment=alone).python(COMMAND, *options, "--save_steps", 2).status
        == -9
    )
    before = (tmp_path / "run" / "config.json").read_bytes()
    ended = Launch(tmp_path).torchrun(3, COMMAND, *options, "--save_steps", 2)
    refused = (
        "3 ranks do not divide the global batch of 4 rows that this run was started "
        "with; allowed: 1, 2, 4"
    )
    assert own_lines(ended) == [f"benchmark.py: {refused}"]
    assert "exitcode  : 2" in ended.err
    assert (tmp_path / "run" / "config.json").read_bytes() == before
