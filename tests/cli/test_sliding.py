"""A model whose first layer slides and has no memory: what the commands say is of the layers that
have one."""

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from checks_models import GEMMA, LLAMA, shake
from memory_models import story
from mka import cli
from mka.data import load_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder pretrained, and a text."""
    place = tmp_path_factory.mktemp("sliding")
    (place / "text.txt").write_text("\n".join(story(seed) for seed in range(40)), encoding="utf-8")
    tokenizer = load_tokenizer("bpe", [story(seed) for seed in range(9)], 300)
    sizes: dict[str, Any] = (
        LLAMA | GEMMA | {"vocab_size": tokenizer.vocab_size, "eos_token_id": tokenizer.eos_id}
    )
    shake(Gemma3ForCausalLM(Gemma3TextConfig(**sizes))).save_pretrained(place / "pretrained")
    tokenizer.save(place / "pretrained")
    return place


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    capsys.readouterr()
    status = cli.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    assert (status, printed.err) == (0, "")
    return printed.out


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("mka", "1 of them with a memory; window 8, sinks 4"),
        ("gqa", "0 of them with a memory; window 8"),
    ],
)
def test_convert_says_the_window_of_the_full_layers(
    kind: str, said: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = (
        "convert",
        "--model",
        place / "pretrained",
        "--output",
        tmp_path / "new",
        "--attention_type",
        kind,
    )
    assert said in run(capsys, *command, "--local_window", 8)


def test_a_bank_of_a_model_whose_first_layer_has_no_memory(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bank, converted = tmp_path / "bank", tmp_path / "new"
    options = ("--local_window", 8, "--chunk_size", 4, "--top_k", 3)
    run(capsys, "convert", "--model", place / "pretrained", "--output", converted, *options)
    out = run(capsys, "memory", "add", place / "text.txt", "--model", converted, "--bank", bank)
    count = re.search(r"([\d,]+) tokens, ([\d,]+) chunks", out)
    assert count is not None
    tokens, chunks = (int(number.replace(",", "")) for number in count.groups())
    assert chunks == tokens // 4
    dropped = f"the last {tokens % 4} tokens were dropped (incomplete chunk)"
    assert (dropped in out) == bool(tokens % 4)
    command = ("generate", "--model", converted, "--prompt", "the cat", "--max_new_tokens", 3)
    assert f"bank: {chunks:,} chunks" in run(capsys, *command, "--bank", bank, "--show_memory")
