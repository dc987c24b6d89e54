"""Ctrl-C ends a run cleanly: one line, status 130, finished results kept, and the same command goes
on from there."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mka.record.results import read_results
from tiny_runs import BENCHMARK_SCRIPT, Place, write_corpus

GO_ON = "run the same command again to resume; finished results are kept\n"
LINE = f"interrupted; {GO_ON}"
STEPS = 80


@pytest.fixture
def signals_as_in_a_terminal() -> Iterator[None]:
    """A process that was started in the background ignores Ctrl-C, and so do those that it
    starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("signals_as_in_a_terminal")
def test_ctrl_c_in_a_real_run(tmp_path: Path) -> None:
    """The first mechanism is done when the signal comes; the second is in training: its step is
    finished and saved."""
    command = [
        sys.executable,
        BENCHMARK_SCRIPT,
        "--dataset",
        "text",
        "--text_path",
        write_corpus(tmp_path / "text"),
    ]
    command += ["--attention_type", "mqa", "fmka", "--sequence_length", "16", "--batch_size", "1"]
    command += ["--max_steps", str(STEPS), "--output_dir", tmp_path / "run"]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    pipes: dict[str, Any] = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
        "text": True,
        "env": environment,
    }
    with subprocess.Popen(command, **pipes) as process:
        second = False
        for line in process.stdout or ():
            second |= line.startswith("🏁 Testing FMKA")
            if second and line.startswith(f"  step {STEPS // 5}/{STEPS} "):
                process.send_signal(signal.SIGINT)
                break
        rest, complaint = process.communicate()
    assert process.returncode == 130
    said = re.fullmatch(
        rf"benchmark\.py: interrupted after step (\d+) of {STEPS}; {GO_ON}", complaint
    )
    assert said, complaint
    step = int(said[1])
    assert STEPS // 5 <= step <= STEPS
    [checkpoint] = (tmp_path / "run" / "checkpoints" / "fmka-seed0").glob("step-*")
    assert checkpoint.name == f"step-{step:08d}"
    assert "Traceback" not in rest
    raw = (tmp_path / "run" / "results.jsonl").read_bytes()
    assert raw.endswith(b"\n")
    assert [json.loads(line)["attention_type"] for line in raw.splitlines()] == ["mqa"]

    again = subprocess.run(command, **pipes, check=False)
    assert (again.returncode, again.stderr) == (0, "")
    assert "✅ MQA with seed 0 is already in" in again.stdout
    assert f"Resuming after step {step} of {STEPS}\n" in again.stdout
    assert (tmp_path / "run" / "results.jsonl").read_bytes().startswith(raw)
    assert [row.attention_type for row in read_results(tmp_path / "run")] == ["mqa", "fmka"]
    assert (tmp_path / "run" / "table.md").is_file()
    assert not (tmp_path / "run" / "checkpoints").exists()


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "where",
    [
        "mka.cli.commands.parse",
        "mka.experiments.run_benchmark",
        "mka.experiments.comparison.load_corpus",
        "mka.experiments.comparison.prepare_tokens",
        "mka.experiments.comparison.agree_with_folder",
        "mka.experiments.comparison.open_folder",
        "mka.experiments.benchmark.build_model",
        "mka.training.loop.TorchEngine.gradients",
        "mka.training.loop.TorchEngine.step",
        "mka.training.checkpoint.save_file",
        "mka.training.checkpoint.write_folder",
        "mka.experiments.benchmark.held_out_loss",
        "mka.training.checkpoint.Checkpoints.export_weights",
        "mka.experiments.benchmark.write_curve",
        "mka.experiments.benchmark.append_result",
        "mka.training.checkpoint.Checkpoints.clear",
        "mka.report.result_lines",
        "mka.report.write_report",
        "mka.report.console_table",
    ],
)
def test_ctrl_c_anywhere(place: Place, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("--attention_type", "mqa", "--max_steps", 1)
    with monkeypatch.context() as patch:
        patch.setattr(where, interrupt)
        ended = place.bench(*command)
    assert (ended.status, ended.err) == (130, f"benchmark.py: {LINE}")
    assert place.bench(*command).status == 0
    assert place.keys() == [("mqa", 0)]
