"""Every example runs, as a user would start it, in a process of its own."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from mka.record.folders import claimed
from tiny_runs import BENCHMARK_SCRIPT, write_corpus, write_small_stdlib

EXAMPLES = sorted((BENCHMARK_SCRIPT.parent.parent.parent / "examples").glob("*.py"))
ARGUMENTS = {
    "attention_in_your_model.py": (),
    "distributed_fmka_example.py": ("--max_steps", "2", "--num_ranks", "2", "--text_path", "TEXT"),
    "fmka_example.py": ("--max_steps", "2", "--num_tokens", "5", "--prompt", "def attend("),
    "passkey_example.py": ("--max_steps", "2", "--output_dir", "cache/passkey"),
    "recall_example.py": ("--max_steps", "2", "--output_dir", "cache/recall"),
    "trainer_example.py": ("--max_steps", "2"),
}
"""What makes an example short; each must be named. TEXT stands for a file with some."""
PRINTED = {
    "attention_in_your_model.py": "fmka",
    "distributed_fmka_example.py": "2 rank(s) on cpu, ddp",
    "fmka_example.py": "def attend(",
    "passkey_example.py": "mka eval needle --model cache/passkey/mka-w64-seed0",
    "recall_example.py": "mka eval recall --model cache/recall/mka-w16-seed0",
    "trainer_example.py": "gates of the memories, by layer: 1.000, 1.000, 1.000, 1.000",
}
START = """
import runpy, sys, types
from mka.data import corpus
stdlib, example = sys.argv[1:3]
corpus.sysconfig = types.SimpleNamespace(get_paths=lambda: {"stdlib": stdlib})
sys.argv = sys.argv[2:]
runpy.run_path(example, run_name="__main__")
"""
"""Runs an example on a few pages instead of the whole standard library."""


def test_there_are_examples() -> None:
    assert {path.name for path in EXAMPLES} >= {"attention_in_your_model.py", "fmka_example.py"}


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_runs(example: Path, tmp_path: Path) -> None:
    assert example.name in ARGUMENTS, "say here how this example is kept short"
    stdlib = tmp_path / "stdlib"
    stdlib.mkdir()
    command = [
        sys.executable,
        "-W",
        "error",
        "-c",
        START,
        str(write_small_stdlib(stdlib)),
        str(example),
    ]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    arguments = [
        str(write_corpus(tmp_path / "text", 60_000)) if word == "TEXT" else word
        for word in ARGUMENTS[example.name]
    ]
    done = subprocess.run(
        [*command, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        cwd=tmp_path,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert PRINTED[example.name] in done.stdout
    saved = [path.parent for path in tmp_path.glob("cache/*/*/model.safetensors")]
    assert all((folder / "manifest.json").is_file() for folder in saved), (
        "a saved model carries its checksums"
    )
    assert len(saved) == ("Saved  " in done.stdout)
    assert {path.name for path in tmp_path.iterdir()} <= {"stdlib", "cache", "text"}, (
        "an example leaves no files about"
    )


def test_two_examples_do_not_write_to_one_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    [example] = [path for path in EXAMPLES if path.name == "recall_example.py"]
    monkeypatch.setattr(sys, "argv", [str(example), "--output_dir", str(tmp_path)])
    with claimed(tmp_path, "mka-w16-seed0"), pytest.raises(SystemExit) as stop:
        runpy.run_path(str(example), run_name="__main__")
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        f"recall_example.py: another run is writing to {tmp_path / 'mka-w16-seed0'}; wait "
        "until it has ended, or "
        "choose another --output_dir\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == [".mka-w16-seed0.lock"]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_an_example_says_how_to_start_it(example: Path) -> None:
    assert f"python examples/{example.name}\n" in example.read_text(encoding="utf-8")
