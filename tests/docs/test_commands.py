"""What is written down works: the original's commands word for word, and those of the README and of
docs/."""

import re
import runpy
import shlex
import sys
import types
from typing import Any

import pytest

from mka.cli.commands import parse
from mka.data import corpus
from mka.record.config import PRESETS, BenchmarkConfig, ResolvedConfig
from mka.record.mechanisms import MECHANISMS
from mka.record.results import read_results
from tiny_runs import BENCHMARK_SCRIPT, TINY, Place, write_small_stdlib

ROOT = BENCHMARK_SCRIPT.parent.parent.parent
SIX = tuple(MECHANISMS)
QUICK = PRESETS["quick"]

ORIGINAL: dict[str, dict[str, Any]] = {
    "python src/experiments/benchmark.py": {
        "attention_type": SIX,
        "preset": "quick",
        "dataset": "stdlib",
        "num_groups": 4,
        "epochs": None,
        "max_steps": QUICK.max_steps,
        "fp16": False,
        "bf16": False,
        "seeds": (0,),
        "match": "none",
        "output_dir": None,
    },
    "python src/experiments/benchmark.py --attention_type mka": {
        "attention_type": ("mka",),
        "max_steps": QUICK.max_steps,
        "local_window": "auto",
    },
    (
        "python src/experiments/benchmark.py --attention_type gqa --num_groups 8 --batch_size 16 "
        "--epochs 5"
    ): {
        "attention_type": ("gqa",),
        "num_groups": 8,
        "batch_size": 16,
        "epochs": 5,
        "max_steps": None,
    },
    "python src/experiments/benchmark.py --batch_size 8 --epochs 3": {
        "attention_type": SIX,
        "batch_size": 8,
        "epochs": 3,
        "max_steps": None,
    },
    (
        "python src/experiments/benchmark.py --gradient_accumulation_steps 4 --learning_rate 1e-4 "
        "--fp16"
    ): {
        "attention_type": SIX,
        "gradient_accumulation_steps": 4,
        "learning_rate": 1e-4,
        "fp16": True,
        "batch_size": QUICK.batch_size,
        "max_steps": QUICK.max_steps,
    },
}
"""The commands and what they must come to."""
LAUNCHES = (
    "torchrun --nproc_per_node=2 src/experiments/benchmark.py",
    "torchrun --nproc_per_node=2 src/experiments/benchmark.py --attention_type mka --fp16",
    "torchrun --nproc_per_node=2 src/experiments/benchmark.py --gradient_accumulation_steps 4",
    "torchrun --nproc_per_node=2 src/experiments/benchmark.py "
    "--attention_type gqa --num_groups 8 --batch_size 16 --epochs 5",
    "torchrun --nproc_per_node=8 src/experiments/benchmark.py --attention_type fmka --fp16",
    "deepspeed src/experiments/benchmark.py --deepspeed",
    "deepspeed src/experiments/benchmark.py --deepspeed --deepspeed_config ds_config.json",
    "python examples/distributed_fmka_example.py",
)
"""The original's launches, with 2 where it writes N; docs/training.md has them, tests/distributed
starts them."""


@pytest.mark.parametrize("through", ["benchmark.py", "mka bench"])
@pytest.mark.parametrize("command", ORIGINAL)
def test_an_original_command_is_understood(command: str, through: str) -> None:
    arguments = shlex.split(command)[2:]
    if through == "mka bench":
        given = parse("mka", "", ["bench", *arguments])[1]
    else:
        given = parse("benchmark.py", "bench", arguments)[1]
    assert type(given) is BenchmarkConfig
    resolved = given.resolved()
    assert type(resolved) is ResolvedConfig
    assert {name: getattr(resolved, name) for name in ORIGINAL[command]} == ORIGINAL[command]


@pytest.fixture
def small_world(
    place: Place, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Place:
    """The default preset and the default corpus are tiny; nothing else is different."""
    paths = {"stdlib": str(write_small_stdlib(tmp_path_factory.mktemp("stdlib")))}
    monkeypatch.setattr(corpus, "sysconfig", types.SimpleNamespace(get_paths=lambda: paths))
    monkeypatch.setitem(PRESETS, "quick", TINY)
    monkeypatch.setattr("mka.experiments.benchmark.LOOK_TOKENS", 64)
    return place


@pytest.mark.parametrize("command", ORIGINAL)
def test_an_original_command_runs(
    command: str,
    small_world: Place,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The script itself, with these very words; it is started elsewhere, so that runs/ is the
    test's own."""
    monkeypatch.setattr(sys, "argv", shlex.split(command)[1:])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(BENCHMARK_SCRIPT), run_name="__main__")
    printed = capsys.readouterr()
    assert (stop.value.code, printed.err) == (0, "")
    [folder] = (small_world.folder / "runs").iterdir()
    rows = read_results(folder)
    expected = ORIGINAL[command]
    assert [row.attention_type for row in rows] == list(expected["attention_type"])
    assert all(row.environment["precision"] == "float16" for row in rows) or not expected.get(
        "fp16"
    )
    for row in rows:
        assert f"{row.train_tokens:,} tokens for each mechanism and seed" in printed.out
        assert f"📊 Results for {row.attention_type.upper()}:" in printed.out


# ---- the README and docs/

PAGES = [
    path for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))) if path.is_file()
]
BLOCK = re.compile(r"^( *)```(?:bash|sh|shell|console)\n(.*?)^\1```", re.MULTILINE | re.DOTALL)
OURS = ("mka", "python src/experiments/benchmark.py", "torchrun ", "deepspeed ")
SCRIPTS = ("python examples/", "python benchmarks/")


def commands(text: str) -> list[str]:
    """The commands of this project in the fenced shell blocks of a page, as a user would type them
    at the root."""
    lines = [
        line for _, block in BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()
    ]
    found = (re.sub(r"^(\$ )?(\w+=\S+ )*(\.venv/bin/|\./)?", "", line.strip()) for line in lines)
    return [line for line in found if line.startswith(("mka ", "make ", *OURS[1:], *SCRIPTS))]


WRITTEN = [
    pytest.param(command, id=f"{page.relative_to(ROOT)}: {command}")
    for page in PAGES
    for command in commands(page.read_text("utf-8"))
]


def test_commands_are_found() -> None:
    text = """
```bash
make bench ARGS="--epochs 2"   # everything
$ mka bench --attention_type mka \\
    --epochs 5
ls
OMP_NUM_THREADS=1 .venv/bin/python benchmarks/speed.py
```

1. a list

   ```sh
   .venv/bin/mka report runs/a
   ```

```python
mka = 3
mka bench
```
"""
    assert [" ".join(command.split()) for command in commands(text)] == [
        'make bench ARGS="--epochs 2" # everything',
        "mka bench --attention_type mka --epochs 5",
        "python benchmarks/speed.py",
        "mka report runs/a",
    ]


def test_the_readme_has_commands() -> None:
    readme = ROOT / "README.md"
    assert readme.is_file()
    text = readme.read_text(encoding="utf-8")
    assert len(commands(text)) >= 5
    assert len(text.splitlines()) <= 200
    for command in ORIGINAL:
        assert command in [line.partition("#")[0].strip() for line in commands(text)], (
            f"the README lacks: {command}"
        )


@pytest.mark.parametrize("command", LAUNCHES)
def test_the_original_launches_are_written_down(command: str) -> None:
    page = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    assert command in [" ".join(line.partition("#")[0].split()) for line in commands(page)]


@pytest.mark.parametrize("command", WRITTEN)
def test_a_written_command_is_right(command: str) -> None:
    check(shlex.split(command, comments=True))


def check(words: list[str]) -> None:
    """Raises what the parser raises, or fails if there is no such file or goal."""
    if words[0] == "make":
        goals = re.findall(
            r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE
        )
        assert words[1] in goals
        options = [word.partition("=")[2] for word in words if word.startswith("ARGS=")]
        if options and words[1] == "bench":
            understand("benchmark.py", "bench", shlex.split(options[0]))
    elif words[0] == "mka":
        understand("mka", "", words[1:])
    elif "src/experiments/benchmark.py" in words:
        options = words[words.index("src/experiments/benchmark.py") + 1 :]
        understand("benchmark.py", "bench", options)
        files = [word for word in options if word.endswith(".json")]
        assert all((ROOT / file).is_file() for file in files), f"no such file: {files}"
    else:
        assert (ROOT / words[1]).is_file()


def understand(program: str, name: str, arguments: list[str]) -> None:
    if "--help" in arguments:
        return
    _, given = parse(program, name, arguments)
    if isinstance(given, BenchmarkConfig):
        given.resolved()


@pytest.mark.parametrize(
    "command",
    [
        "mka bench --atention_type mka",
        "mka bench --attention_type mak",
        "mka bech",
        "python src/experiments/benchmark.py --num_groups 3",
        "python examples/nowhere.py",
        "make coffee",
        'make bench ARGS="--epoch 3"',
        "torchrun --nproc_per_node=2 src/experiments/benchmark.py --strategy zero",
        "deepspeed src/experiments/benchmark.py --deepspeed --deepspeed_config nowhere.json",
    ],
)
def test_a_wrong_command_would_be_seen(command: str) -> None:
    with pytest.raises((ValueError, AssertionError)):
        check(shlex.split(command))
