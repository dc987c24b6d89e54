"""Benchmark runs that take a fraction of a second: a tiny model on a few pages of text, by the real
command line."""

import gc
import hashlib
import importlib
import io
import json
import shutil
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mka import cli
from mka.data.corpus import split_by_document
from mka.record.config import PRESETS, Preset

TINY = Preset(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=8,
    vocab_size=300,
    tokenizer="bpe",
    sequence_length=32,
    batch_size=2,
    max_steps=3,
    learning_rate=3e-3,
    eval_tokens=256,
)
CORPUS_CHARACTERS = 16_000
BENCHMARK_SCRIPT = Path(__file__).parent.parent / "src" / "experiments" / "benchmark.py"


@dataclass(frozen=True)
class Ended:
    """How a command ended and what it printed."""

    status: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The one line on stderr of a command that refused."""
        assert self.status == 2, self
        assert self.err.endswith("\n")
        assert len(self.err.splitlines()) == 1, self.err
        assert "Traceback" not in self.out + self.err
        return self.err.rstrip("\n")


def end(entry: Callable[[list[str]], int], *arguments: object) -> Ended:
    """Call an entry point of the command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = entry([str(argument) for argument in arguments])
    return Ended(status, out.getvalue(), err.getvalue())


@dataclass(frozen=True)
class Place:
    """A folder of its own, with a corpus, and commands that run in it."""

    folder: Path
    corpus: Path

    @property
    def options(self) -> list[object]:
        return ["--preset", "tiny", "--dataset", "text", "--text_path", self.corpus]

    def bench(self, *arguments: object, output: str | None = "run") -> Ended:
        where = [] if output is None else ["--output_dir", self.folder / output]
        return end(cli.bench, *self.options, *where, *arguments)

    def rows(self, output: str = "run") -> list[dict[str, Any]]:
        """Every line of results.jsonl, each of which must be whole."""
        lines = (
            (self.folder / output / "results.jsonl")
            .read_text(encoding="utf-8")
            .splitlines(keepends=True)
        )
        assert all(line.endswith("\n") for line in lines)
        return [json.loads(line) for line in lines]

    def keys(self, output: str = "run") -> list[tuple[str, int]]:
        return [(row["attention_type"], row["seed"]) for row in self.rows(output)]


def finished_run(place: Place, *arguments: object) -> Path:
    """The folder of a run that has ended well."""
    assert place.bench(*arguments).status == 0
    return place.folder / "run"


def with_copy(place: Place, run: Path) -> Place:
    """The place, with a copy of a finished run that may be changed."""
    shutil.copytree(run, place.folder / "run")
    return place


def fingerprint(folder: Path) -> dict[str, str]:
    """What lies below a folder: every name, with the sha256 of a file's bytes."""
    found = {}
    for path in sorted(folder.rglob("*")):
        readable = path.is_file()
        found[str(path.relative_to(folder))] = (
            hashlib.sha256(path.read_bytes()).hexdigest() if readable else "no file"
        )
    return found


def write_corpus(path: Path, characters: int = CORPUS_CHARACTERS) -> Path:
    """Real text, out of the standard library."""
    source = Path(sysconfig.get_paths()["stdlib"]) / "argparse.py"
    path.write_text(source.read_text(encoding="utf-8")[:characters], encoding="utf-8")
    return path


def write_small_stdlib(folder: Path) -> Path:
    """A few pages of the standard library, so chosen that each split has some."""
    real = Path(sysconfig.get_paths()["stdlib"])
    texts = [
        (path.name, path.read_text(encoding="utf-8")[:2000]) for path in sorted(real.glob("*.py"))
    ]
    splits = split_by_document((name, text) for name, text in texts if len(text) == 2000)
    for name, text in [*splits["train"][:3], *splits["validation"][:1], *splits["test"][:1]]:
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tiny_place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One for a module, with the preset "tiny" and a token cache of its own."""
    home = tmp_path_factory.mktemp("tiny")
    folder = home / "work"
    folder.mkdir()
    importlib.import_module("mka.experiments")
    gc.freeze()  # or each mechanism's garbage collection looks through all of torch
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        patch.setenv("XDG_CACHE_HOME", str(home / "cache"))
        yield Place(folder, write_corpus(home / "corpus.txt"))
    gc.unfreeze()


@pytest.fixture
def place(tiny_place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The same with an empty folder for each test, which is also the current one."""
    monkeypatch.chdir(tmp_path)
    return Place(tmp_path, tiny_place.corpus)
