"""SIGTERM and Ctrl-C: the step is finished and saved, the status says which, and going on ends with
the same bytes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mka.record.results import RunFolder
from resume.child import Instant
from resume.runs import PATIENCE, Case
from tiny_runs import BENCHMARK_SCRIPT, fingerprint, write_corpus

TERM, INT = (signal.SIGTERM,), (signal.SIGINT,)
STEP, SAVE = "mka.training.loop.take_step", "mka.training.checkpoint.save_file"


@pytest.mark.parametrize(
    ("signals", "status", "function", "call", "steps"),
    [
        pytest.param(TERM, 143, STEP, 5, [3, 5], id="SIGTERM in step 5"),
        pytest.param(INT, 130, SAVE, 1, [3, 4], id="SIGINT in the save after step 3"),
        pytest.param(
            TERM,
            143,
            SAVE,
            1,
            [3, 4],
            id="SIGTERM in the save after step 3",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            TERM, 143, STEP, 6, [3, 6], id="SIGTERM in a step with a save", marks=pytest.mark.slow
        ),
        pytest.param(INT, 130, STEP, 5, [3, 5], id="SIGINT in step 5", marks=pytest.mark.slow),
        pytest.param(
            TERM, 143, STEP, 12, [9, 12], id="SIGTERM in the last step", marks=pytest.mark.slow
        ),
    ],
)
def test_one_signal(
    whole: Case,
    case: Case,
    signals: tuple[int, ...],
    status: int,
    function: str,
    call: int,
    steps: list[int],
) -> None:
    stopped = case.start(Instant(function, call, signals=signals))
    assert stopped.statuses == [status]
    last = stopped.printed.splitlines()[-1]
    assert last.startswith(
        f"benchmark.py: interrupted after step {steps[-1]} of 12; run the same command again"
    )
    assert "Traceback" not in stopped.printed
    assert case.checkpoints("mha") == steps
    assert f"Resuming after step {steps[-1]} of 12" in case.go_on().printed
    assert case.outcome() == whole.outcome()


@pytest.mark.parametrize(
    ("function", "call"),
    [
        pytest.param("mka.storage.sync_file", 12, id="in a save"),
        pytest.param(STEP, 5, id="in a step", marks=pytest.mark.slow),
        pytest.param(SAVE, 3, id="before a save", marks=pytest.mark.slow),
        pytest.param(
            "mka.experiments.benchmark.append_result",
            1,
            id="before the result",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "mka.data.tokens.write_split", 2, id="in the corpus build", marks=pytest.mark.slow
        ),
    ],
)
def test_ctrl_c_twice(whole: Case, case: Case, function: str, call: int) -> None:
    """The second one does not wait for the step."""
    stopped = case.start(Instant(function, call, signals=INT * 2))
    assert stopped.statuses == [130]
    assert "Traceback" not in stopped.printed
    assert "interrupted" in stopped.printed.splitlines()[-1]
    case.go_on()
    assert case.outcome() == whole.outcome()


def test_sigterm_between_two_mechanisms(whole: Case, case: Case) -> None:
    """Nothing is in the making, so nothing has to be saved."""
    stopped = case.start(Instant("mka.experiments.benchmark.make_model", 2, signals=TERM))
    assert stopped.statuses == [-signal.SIGTERM] or stopped.statuses == [143]
    assert case.finished() == ["mha"]
    case.go_on()
    assert case.outcome() == whole.outcome()


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_on_one_of_two_ranks(whole_on_two: Case, case_on_two: Case, rank: int) -> None:
    """The ranks agree to stop after the same step, whichever of them got the signal."""
    stopped = case_on_two.start(Instant(STEP, 5, signals=TERM, rank=rank))
    assert stopped.statuses == [143, 143], stopped.printed
    assert case_on_two.checkpoints("mha") == [3, 5]
    case_on_two.go_on()
    assert case_on_two.outcome() == whole_on_two.outcome()


@pytest.mark.slow
def test_sigterm_to_torchrun(whole_on_two: Case, case_on_two: Case) -> None:
    """It passes the signal on to its ranks and gives them time to save."""
    stopped = case_on_two.torchrun(Instant(STEP, 5, signals=TERM, to_parent=True))
    assert stopped.statuses != [0]
    assert "interrupted after step 5 of 12" in stopped.printed
    assert case_on_two.checkpoints("mha") == [3, 5]
    case_on_two.go_on()
    assert case_on_two.outcome() == whole_on_two.outcome()


@pytest.mark.slow
def test_sigterm_to_the_real_script(tmp_path: Path) -> None:
    """From outside, at whatever instant it happens to come."""
    command = [
        sys.executable,
        str(BENCHMARK_SCRIPT),
        "--dataset",
        "text",
        "--attention_type",
        "mqa",
    ]
    command += [
        "--text_path",
        str(write_corpus(tmp_path / "text")),
        "--sequence_length",
        "16",
        "--batch_size",
        "1",
    ]
    command += ["--max_steps", "200", "--save_steps", "50", "--output_dir"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    undisturbed = [*command, str(tmp_path / "whole")]
    subprocess.run(
        undisturbed, env=environment, check=True, timeout=PATIENCE, stdout=subprocess.DEVNULL
    )

    run = tmp_path / "run"
    with subprocess.Popen(
        [*command, str(run)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout or ():
            if line.startswith("  step 40/200"):
                process.terminate()
                break
        complaint = process.communicate(timeout=PATIENCE)[1]
    assert process.returncode == 143
    step = int(complaint.removeprefix("benchmark.py: interrupted after step ").split()[0])
    assert step >= 40
    assert (run / "checkpoints" / "mqa-seed0" / f"step-{step:08d}" / "manifest.json").is_file()
    assert not RunFolder(run).results.exists()

    again = subprocess.run(
        [*command, str(run)],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    assert f"Resuming after step {step} of 200" in again.stdout
    assert again.stderr == ""
    assert fingerprint(run / "models") == fingerprint(tmp_path / "whole" / "models")
