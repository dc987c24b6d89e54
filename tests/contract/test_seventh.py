"""A seventh mechanism, added by CONTRIBUTING's recipe to a copy of the package: three files, and
everything else knows it."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MECHANISM = '''"""Multi-head attention (arXiv 1706.03762) whose values are its keys.

    q = x Wq    k = x Wk    o_t = sum_s softmax_s(q_t . k_s / sqrt(D)) k_s over s <= t    y = o Wo

B rows, T tokens, C hidden size, H heads, D = C / H.
"""

import torch
from torch import Tensor, nn

from mka.attention.base import Bias, CausalAttention
from mka.memory.entry import Entry
from mka.memory.local import attend_local, local_entries
from mka.memory.state import State
from mka.ops.rotary import RotaryEmbedding

KEYS = ("k", "k")


class TiedAttention(CausalAttention):
    """Keys are values. Raises ValueError where H does not divide C."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        local_window: int | None = None,
        sink_tokens: int | None = None,
        head_dim: int | None = None,
        bias: Bias = False,
        rotary: RotaryEmbedding | None = None,
    ) -> None:
        super().__init__(
            hidden_size, num_heads, num_heads, local_window, head_dim, bias, rotary, sink_tokens
        )
        self.q_proj = nn.Linear(hidden_size, self.inner_size, bias=bool(bias))
        self.k_proj = nn.Linear(hidden_size, self.inner_size, bias=bool(bias))
        self.o_proj = self.output_projection()

    def heads(self, layer: nn.Module, x: Tensor, positions: Tensor | None) -> Tensor:
        """(..., C) -> (..., H, D), rotated."""
        return self.rotate(layer(x).unflatten(-1, (self.num_heads, -1)), positions)

    def mix(self, x: Tensor, positions: Tensor | None, state: State | None) -> Tensor:
        q, k = (self.heads(layer, x, positions) for layer in (self.q_proj, self.k_proj))
        return self.o_proj(attend_local(q, k, k, self.window, state, KEYS).values.flatten(2))

    def state_entries(self, dtype: torch.dtype) -> dict[str, Entry]:
        """The keys of the window and of the sinks."""
        return local_entries(KEYS, (self.num_heads, self.head_dim), dtype, self.window)

    @property
    def num_parameters(self) -> int:
        """Parameters, computed from the configuration."""
        return self.linear_parameters(*[(self.hidden_size, self.inner_size)] * 2)

    def flops_per_token(self, context: int) -> int:
        """FLOPs of the matrix products of one token."""
        products = 2 * 3 * self.hidden_size * self.inner_size
        return products + 4 * self.inner_size * self.keys_attended(context)
'''
TWIN = """

def naive_tied(attn: TiedAttention, x: Tensor, positions: Tensor) -> Iterator[Tensor]:
    keys = []
    for x_t, position in zip(x, positions, strict=True):
        keys.append(place(attn.rotary, attn.heads(attn.k_proj, x_t, None), position))
        q = place(attn.rotary, attn.heads(attn.q_proj, x_t, None), position)
        seen = [keys[s] for s in window_tokens(attn, len(keys) - 1)]
        read, _ = weighed(all_scores(q, seen), seen)
        yield attn.o_proj(read.flatten())


TWINS[TiedAttention] = naive_tied
"""
ROW = """
    "tied": Mechanism(
        title="Tied Keys and Values",
        class_path="mka.attention.tied:TiedAttention",
        flags=WINDOW,
        color="#7a5c00",
        color_dark="#d8b84a",
        marker="triangle-left",
        is_convertible=False,
    ),
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package with a seventh mechanism."""
    place = tmp_path_factory.mktemp("seventh")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "src" / "mka", place / "src" / "mka", ignore=ignored)
    shutil.copytree(ROOT / "tests", place / "tests", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", place)
    package = place / "src" / "mka"
    (package / "attention" / "tied.py").write_text(MECHANISM)
    twins = package / "attention" / "naive.py"
    text = twins.read_text().replace(
        "from mka.attention.mla import", "from mka.attention.tied import TiedAttention\n\\g", 1
    )
    text = text.replace("TiedAttention\n\\g", "TiedAttention\nfrom mka.attention.mla import", 1)
    twins.write_text(text + TWIN)
    table = package / "record" / "mechanisms.py"
    text = table.read_text()
    end = text.index("\n}\n", text.index("MECHANISMS:")) + 1
    table.write_text(text[:end] + ROW.lstrip("\n") + text[end:])
    (place / "text").mkdir()
    words = [
        "the",
        "cat",
        "sat",
        "on",
        "a",
        "mat",
        "and",
        "the",
        "dog",
        "ran",
        "to",
        "red",
        "house",
    ]
    for number in range(40):
        lines = [" ".join(words[(number + n) % 13 :]) for n in range(60)]
        (place / "text" / f"{number}.txt").write_text("\n".join(lines))
    return place


Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def run(copy: Path) -> Run:
    """Start python in the copy, with its package and its tests before ours."""

    def start(*words: object) -> subprocess.CompletedProcess[str]:
        paths = os.pathsep.join(str(copy / name) for name in ("src", "tests"))
        environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *map(str, words)]
        return subprocess.run(
            command, capture_output=True, text=True, cwd=copy, env=environment, check=False
        )

    return start


def test_the_contract_runs_over_it(run: Run) -> None:
    tests = ["tests/contract", "tests/attention/test_registry.py"]
    ended = run(
        "-m", "pytest", "-q", "-k", "tied and not seventh", "-p", "no:cacheprovider", *tests
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr
    passed = re.search(r"(\d+) passed", ended.stdout)
    assert passed is not None
    assert int(passed[1]) > 100
    assert "failed" not in ended.stdout


def test_the_benchmark_the_report_and_the_page_know_it(run: Run, copy: Path) -> None:
    folder, page = copy / "run", copy / "page.html"
    budget = ["--max_steps", 2, "--sequence_length", 32, "--batch_size", 2]
    corpus = ["--dataset", "text", "--text_path", copy / "text"]
    kinds = ["--attention_type", "mha", "tied", "--local_window", 8]
    command = (
        "from mka.record.config import PRESETS; from tiny_runs import TINY; "
        "PRESETS['quick'] = TINY; "
        "from mka.cli import main; import sys; sys.exit(main(sys.argv[1:]))"
    )
    ended = run("-c", command, "bench", *budget, *corpus, *kinds, "--output_dir", folder)
    assert ended.returncode == 0, ended.stderr
    assert "Using Tied Keys and Values" in ended.stdout
    ended = run("-m", "mka", "report", folder, "--html", page, "--markdown", copy / "page.md")
    assert ended.returncode == 0, ended.stderr
    table = (folder / "table.md").read_text()
    assert "| TIED |" in table
    assert "- TIED: Tied Keys and Values" in table
    for figure in (folder / "figures").glob("*.svg"):
        assert "#7a5c00" in figure.read_text(), figure
    html = page.read_text()
    assert "#7a5c00" in html
    assert "#d8b84a" in html
    assert "TIED" in (copy / "page.md").read_text()


def test_the_command_line_knows_it(run: Run) -> None:
    ended = run("-m", "mka", "bench", "--help")
    assert re.search(
        r"mha,\s+mqa,\s+gqa,\s+mla,\s+mka,\s+fmka,\s+tied", ended.stdout.replace("│", " ")
    )
    model = ["--model", "nowhere", "--output", "new", "--attention_type", "tied"]
    ended = run("-m", "mka", "convert", *model)
    assert ended.returncode == 2
    assert "allowed: mha, mqa, gqa, mka, fmka" in ended.stderr


@pytest.mark.parametrize("forgotten", ["twin", "row"])
def test_a_part_that_is_forgotten_is_noticed(run: Run, copy: Path, forgotten: str) -> None:
    file = {"twin": "attention/naive.py", "row": "record/mechanisms.py"}[forgotten]
    place = copy / "src" / "mka" / file
    whole = place.read_text()
    part = {"twin": TWIN, "row": '        title="Tied Keys and Values",\n'}[forgotten]
    defect = whole.replace(part, "")
    assert defect != whole
    try:
        place.write_text(defect)
        tests = ["tests/contract/test_contract.py", "-k", "tied and naive and small"]
        ended = run("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests)
        assert ended.returncode != 0
    finally:
        place.write_text(whole)
