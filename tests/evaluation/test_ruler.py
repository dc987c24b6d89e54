"""mka eval ruler: lm-eval's prompts reach the model's writer, and what it writes is scored."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from memory_models import save_model
from mka import cli
from mka.evaluation import ruler

pytestmark = pytest.mark.filterwarnings("ignore")
SAID = re.compile(r"One of the special magic (?:numbers|uuids) for (\S+) is: (\S+)\.")
ASKED = re.compile(r"What (?:is|are all) the special magic \w+ for (\S+) mentioned")


@pytest.fixture
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three of the 500 prompts that are made of a task, by the same function."""
    with ruler.offline():
        from lm_eval.tasks.ruler import niah_utils

    whole = niah_utils.generate_samples
    monkeypatch.setattr(
        niah_utils, "generate_samples", lambda *a, **k: whole(*a, **(k | {"num_samples": 3}))
    )


def right(prompt: str) -> str:
    asked = ASKED.search(prompt)
    assert asked is not None
    return " and ".join(value for key, value in SAID.findall(prompt) if key == asked[1])


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object) -> Any:
    from lm_eval.models.huggingface import HFLM

    prompts: list[str] = []

    def write(_self: Any, requests: Sequence[Any], **_options: Any) -> list[str]:
        prompts.extend(request.args[0] for request in requests)
        return [
            right(request.args[0]) if number == 0 else "7"
            for number, request in enumerate(requests)
        ]

    monkeypatch.setattr(HFLM, "generate_until", write)
    status = cli.main(["eval", "ruler", *map(str, words)])
    return status, capsys.readouterr(), prompts


def test_what_is_written_is_scored(
    few_prompts: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The first of two prompts is answered right, the other one wrong."""
    save_model(tmp_path / "model", "mka")
    output = tmp_path / "ruler.jsonl"
    words = (
        "--model",
        tmp_path / "model",
        "--tasks",
        "niah_single_1",
        "niah_multikey_2",
        "--output",
        output,
    )
    status, printed, prompts = run(monkeypatch, capsys, *words, "--samples", 2)
    assert status == 0, printed.err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["task"], row["tokens"], row["accuracy"], row["samples"]) for row in rows] == [
        ("niah_single_1", 4096, 0.5, 2),
        ("niah_multikey_2", 4096, 0.5, 2),
    ]
    assert len(prompts) == 4
    assert "niah_single_1        4,096     0.500  (2 prompts)" in printed.out


def test_a_model_writes_its_own_answer(
    few_prompts: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through generate and the memories of a real model, which knows nothing."""
    save_model(tmp_path / "model", "fmka")
    words = ("--model", tmp_path / "model", "--tasks", "niah_single_1", "--samples", 1)
    assert cli.main(["eval", "ruler", *map(str, words)]) == 0
    assert "niah_single_1        4,096     0.000  (1 prompts)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--tasks", "niah_singel_1"), "unknown task 'niah_singel_1'"),
        (("--lengths", "1000"), "lengths holds 1000; allowed: 4096, 8192"),
        (("--samples", "0"), "samples is 0; it must be at least 1"),
    ],
)
def test_mistakes_are_one_line(
    words: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", "ruler", "--model", "nowhere", *words]) == 2
    error = capsys.readouterr().err
    assert line in error
    assert error.count("\n") == 1


def test_a_model_with_too_few_positions_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mka.data import load_tokenizer
    from mka.models import build_model, gpt2_config

    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    build_model(gpt2_config(vocab_size=300, **sizes), "mka").save_pretrained(tmp_path)
    load_tokenizer("bpe", ["some text"] * 9, 300).save(tmp_path)
    assert cli.main(["eval", "ruler", "--model", str(tmp_path)]) == 2
    assert "lengths holds 4096; " in capsys.readouterr().err


def test_without_its_packages_it_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        ruler, "find_spec", lambda name: None if name == "wonderwords" else object()
    )
    assert cli.main(["eval", "ruler", "--model", "nowhere"]) == 2
    assert (
        "eval ruler needs the package wonderwords; pip install 'mka[ruler]'"
        in capsys.readouterr().err
    )
