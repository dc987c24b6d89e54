"""A model of finite weights that does not give numbers: every command that asks it ends with one
line, not a figure."""

import io
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from memory_models import save_model, story
from mka import cli
from mka.memory.state import State
from mka.models import read_in_pieces


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose head overflows, a good one, and a text."""
    place = tmp_path_factory.mktemp("models")
    save_model(place / "good", "mka")
    path = save_model(place / "bad", "mka") / "model.safetensors"
    weights = load_file(path)
    head = weights["lm_head.weight"].sign() * 3e38
    path.unlink()
    save_file(weights | {"lm_head.weight": head}, path, {"format": "pt"})
    (place / "text.txt").write_text(story(1, 400))
    return place


TEXT = "--dataset text --text_path text.txt --split train"
COMMANDS = [
    "generate --model bad --prompt cat",
    "generate --model bad --prompt cat --temperature 1",
    "generate --model bad --prompt_file text.txt --prefill_chunk_size 64",
    "chat --model bad",
    f"eval perplexity --model bad {TEXT}",
    f"eval perplexity --model good --baseline bad {TEXT}",
    f"eval router --model bad --length 32 --rows 2 {TEXT}",
    "eval needle --model bad --lengths 200 --depths 0",
    "eval recall --model bad --shapes 64/4 --samples 2",
    "memory add text.txt --model bad --bank bank",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_it(
    command: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr("sys.stdin", io.StringIO("the cat sat\n"))
    assert cli.main(command.split()) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(
        "mka: model is 'bad'; its weights are finite and its logits are not (NaN or infinity)"
    )
    assert printed.err.count("\n") == 1
    assert "nan" not in printed.out + printed.err
    assert "distinguishable" not in printed.out
    assert not [*place.glob("bank/documents/*")]


def test_a_bank_takes_no_chunk_that_is_no_number(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the logits of the last token are numbers all the same."""
    entries = State.all

    def read_and_spoil(*reading: Any) -> None:
        read_in_pieces(*reading)
        monkeypatch.setattr(State, "all", lambda state, name: entries(state, name) * float("nan"))

    monkeypatch.setattr("mka.models.banks.read_in_pieces", read_and_spoil)
    add = [
        "memory",
        "add",
        str(place / "text.txt"),
        "--model",
        str(place / "good"),
        "--bank",
        str(tmp_path / "bank"),
    ]
    assert cli.main(add) == 2
    err = capsys.readouterr().err
    assert "would hold NaN or infinity" in err
    assert err.count("\n") == 1
    assert not [
        path
        for path in (tmp_path / "bank" / "documents").iterdir()
        if not path.name.startswith(".")
    ]
