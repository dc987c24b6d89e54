"""What a result says about where it was measured."""

import json
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import mka
from mka.experiments import environment
from mka.experiments.environment import commit, describe_environment, processor_name
from tiny_runs import Place


def test_the_record() -> None:
    record = describe_environment(torch.device("cpu"), "float32")
    assert record["mka"] == mka.__version__
    assert record["python"] == platform.python_version()
    assert record["torch"] == torch.__version__
    assert record["transformers"] == transformers.__version__
    assert record["threads"] == torch.get_num_threads()
    assert record["cores"] >= 1
    assert (record["device"], record["precision"]) == ("cpu", "float32")
    assert record["processor"]
    assert json.loads(json.dumps(record)) == record


LAUNCH = {
    "started_by": "python",
    "world_size": 1,
    "machines": 1,
    "strategy": "one process",
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": False,
}


def test_every_row_and_the_folder_have_it(place: Place) -> None:
    assert place.bench("--attention_type", "mha", "mka", "--max_steps", 1).status == 0
    held = json.loads((place.folder / "run" / "environment.json").read_text(encoding="utf-8"))
    assert held == describe_environment(torch.device("cpu"), held["precision"]) | {"launch": LAUNCH}
    assert [row["environment"] for row in place.rows()] == [held, held]


def test_the_commit_is_that_of_the_source_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkout of its own: once clean, once changed."""
    monkeypatch.setattr(environment, "__file__", str(tmp_path / "file.py"))
    assert commit() is None, "no checkout"
    (tmp_path / "file.py").write_text("1\n")
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True, capture_output=True)
    clean = commit()
    assert clean
    assert re.fullmatch(r"[0-9a-f]{12}", clean)
    (tmp_path / "file.py").write_text("2\n")
    assert commit() == f"{clean}+"


def test_without_git_there_is_no_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(environment.subprocess, "run", missing)
    assert commit() is None


def test_the_processor_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listing = tmp_path / "cpuinfo"
    listing.write_text("processor\t: 0\nmodel name\t: A Processor: Fast\nmodel name\t: Another\n")
    monkeypatch.setattr(environment, "CPUINFO", listing)
    assert processor_name() == "A Processor: Fast"
    listing.write_text("processor\t: 0\n")
    assert processor_name()
    listing.unlink()
    assert processor_name()
