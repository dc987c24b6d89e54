"""mka eval: a table of what a saved model recalls, and the same as JSON lines."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_models import save_model, story
from mka import cli
from mka.data import load_tokenizer
from mka.data.needle import Passkey, PasskeyTask
from mka.data.recall import NOT_ASKED, recall_batch
from mka.evaluation import recall
from mka.models import build_model, gpt2_config
from mka.models.loading import load


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    for kind in ("mka", "fmka", "mha"):
        save_model(place / kind, kind)
    (place / "text.txt").write_text(story(5, 2000))
    return place


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.mark.parametrize("kind", ["mka", "fmka", "mha"])
def test_needle(kind: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "needle.jsonl"
    command = ["eval", "needle", "--model", saved / kind, "--lengths", 250, 300, "--depths", 0, 0.5]
    command += [
        "--samples",
        2,
        "--surroundings",
        "text",
        "--text_path",
        saved / "text.txt",
        "--output",
        output,
        "--piece",
        64,
    ]
    status, out, _ = run(capsys, *command)
    assert status == 0
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["tokens"], row["kind"], row["asked"]) for row in rows] == [
        (250, "0", 2),
        (250, "0.5", 2),
        (300, "0", 2),
        (300, "0.5", 2),
    ]
    assert len(out.splitlines()) == 5
    assert all(row["memory_bytes"] > 0 for row in rows)


@pytest.mark.parametrize("kind", ["mka", "mha"])
def test_recall(kind: str, saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "recall.jsonl"
    command = [
        "eval",
        "recall",
        "--model",
        saved / kind,
        "--shapes",
        "64/4",
        "--samples",
        40,
        "--output",
        output,
    ]
    status, out, _ = run(capsys, *command)
    assert status == 0
    (row,) = (json.loads(line) for line in output.read_text().splitlines())
    assert row["asked"] == 160
    assert f"({row['correct']}/160" in out


class Oracle(torch.nn.Module):
    """Says what is due, but for the rows it is told to get wrong."""

    def __init__(self, targets: torch.Tensor, wrong: int) -> None:
        super().__init__()
        self.targets, self.wrong, self.device = targets, wrong, torch.device("cpu")

    def forward(self, tokens: torch.Tensor, **_: Any) -> Any:
        said = self.targets.clamp(min=0)
        said[: self.wrong] += 1
        logits = torch.nn.functional.one_hot(said, 8200).float()
        return type("Output", (), {"logits": logits})


@pytest.mark.parametrize("wrong", [0, 3, 8])
def test_answers_are_counted(wrong: int) -> None:
    batch = recall_batch(64, 4, 8, (0,))
    oracle: Any = Oracle(batch.targets, wrong)
    assert recall.recalled(oracle, batch, recall.LongTermConfig()) == (4 * (8 - wrong), 32)
    assert int((batch.targets != NOT_ASKED).sum()) == 32


@pytest.mark.parametrize("store", ["device", "host", "disk"])
def test_a_prompt_answered_is_what_greedy_decoding_says(store: Any, saved: Path) -> None:
    """The answer that generate gives counts, and no other one."""
    model, tokenizer = load(str(saved / "mka"))
    ids = torch.tensor(tokenizer(story(5)).input_ids).numpy()
    prompt = PasskeyTask(ids, lambda text: tokenizer(text).input_ids).prompt(250, 0.5, (0,)).prompt
    row = torch.from_numpy(prompt)[None]
    said = model.generate(row, max_new_tokens=6, do_sample=False, eos_token_id=None)[
        0, 250:
    ].numpy()
    where = recall.LongTermConfig(longterm_store=store)
    assert recall.answered(model, Passkey(prompt, said), where, 64)[0]
    for place in (0, 3, 5):
        wrong = said.copy()
        wrong[place] = (wrong[place] + 1) % model.config.vocab_size
        assert not recall.answered(model, Passkey(prompt, wrong), where, 64)[0]


BAD = {
    "eval needle --model MKA --lengths 5": "length is 5; key and question alone take",
    "eval needle --model MKA --depths 2": "depths holds 2.0; each must be between 0 and 1",
    "eval needle --model MKA --samples 0": "samples is 0; it must be at least 1",
    "eval needle --model none": "model is 'none'",
    "eval needle --model MKA --surroundings text --text_path none.txt": "none.txt' does not exist",
    "eval needle --model MKA --text_path none.txt": (
        "surroundings is 'filler' and text_path is 'none.txt'"
    ),
    "eval needle --model MKA --surroundings text": "surroundings is 'text' and text_path is None",
    "eval needle --model MHA --longterm_store disk": "retrieves nothing",
    "eval recall --model MKA --shapes 64-4": "shapes holds '64-4'; give tokens/pairs, such as 64/4",
    "eval recall --model MKA --shapes 8/4": "num_tokens is 8; it must be at least 16",
    "eval recall --model MKA --sampels 3": "nearest: --samples",
    "eval neddle --model MKA": "neddle",
}


@pytest.mark.parametrize("command", BAD)
def test_bad_input(command: str, saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    places = {kind.upper(): saved / kind for kind in ("mka", "mha")}
    status, _, err = run(capsys, *(places.get(word, word) for word in command.split()))
    assert status == 2
    assert err.count("\n") == 1
    assert BAD[command] in err


@pytest.mark.parametrize(
    "command",
    [
        "eval needle --lengths 200",
        "eval router --length 200 --rows 1",
        "memory add text.txt --bank bank",
    ],
)
def test_a_row_longer_than_learned_positions_is_one_line(
    command: str,
    saved: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer = load_tokenizer("bpe", [story(1)], 300)
    sizes: dict[str, Any] = {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 64,
    }
    config = gpt2_config(
        hidden_size=16, vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id, **sizes
    )
    build_model(config, "mka", local_window=8, chunk_size=4).save_pretrained(tmp_path / "gpt2")
    tokenizer.save(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(story(5, 2000))
    text = (
        ["--dataset", "text", "--text_path", "text.txt", "--split", "train"]
        if "router" in command
        else []
    )
    status, _, err = run(capsys, *command.split(), "--model", "gpt2", *text)
    assert status == 2
    assert "this GPT-2 has 64 positions" in err
    assert len(err.splitlines()) == 1
