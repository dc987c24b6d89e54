"""Perplexity of documents: against lm-eval, against one forward call, and by hand."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from memory_models import save_model, story
from mka import cli
from mka.cli.evaluate import shown
from mka.evaluation import Perplexity, text_perplexity
from mka.evaluation.text import Window, windows
from mka.models.loading import load

KINDS = ("mha", "mka")
DOCUMENTS = [story(5, 700), "One line only.", story(6, 300) + "\n  two   spaces, and é\n"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        save_model(place / kind, kind)
    (place / "text").mkdir()
    for number in range(12):
        (place / "text" / f"{number}.txt").write_text(story(number, 400 + 30 * number))
    return place


def scored(folder: Path, **options: Any) -> Perplexity:
    return text_perplexity(*load(str(folder)), DOCUMENTS, **options)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_equals_lm_eval(kind: str, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    from lm_eval.api import metrics
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    model, tokenizer = load(str(saved / kind))
    make: Any = HFLM
    theirs = make(
        pretrained=model, tokenizer=tokenizer, max_length=32, batch_size=2, backend="causal"
    )
    requests = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in DOCUMENTS]
    nats = theirs.loglikelihood_rolling(requests, disable_tqdm=True)
    ours = scored(saved / kind, max_length=32)
    assert ours.nats == pytest.approx([-x for x in nats], rel=1e-4)
    assert ours.tokens.min() < 32 < ours.tokens.max()
    by_words = [(x, len(re.split(r"\s+", text))) for x, text in zip(nats, DOCUMENTS, strict=True)]
    by_bytes = [(x, len(text.encode())) for x, text in zip(nats, DOCUMENTS, strict=True)]
    assert math.log(ours.word_perplexity.value) == pytest.approx(
        math.log(metrics.weighted_perplexity(by_words)), 1e-4
    )
    assert ours.bits_per_byte.value == pytest.approx(metrics.bits_per_byte(by_bytes), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stride", [None, 1, 7])
def test_a_document_in_one_window_is_one_call(kind: str, stride: int | None, saved: Path) -> None:
    model, tokenizer = load(str(saved / kind))
    whole = scored(saved / kind, max_length=4000, stride=stride)
    for text, nats in zip(DOCUMENTS, whole.nats, strict=True):
        ids = torch.tensor(
            [[tokenizer.eos_token_id, *tokenizer(text, add_special_tokens=False).input_ids]]
        )
        with torch.no_grad():
            logits = model(ids[:, :-1], use_cache=False).logits
        assert nats == pytest.approx(
            cross_entropy(logits[0], ids[0, 1:], reduction="sum").item(), rel=1e-5
        )


def test_the_stride_decides_what_each_token_sees(saved: Path) -> None:
    """Token by token: what the last `max_length` tokens predict."""
    model, tokenizer = load(str(saved / "mha"))
    ids = torch.tensor(
        [tokenizer.eos_token_id, *tokenizer(DOCUMENTS[2], add_special_tokens=False).input_ids]
    )
    by_hand = 0.0
    for t in range(1, len(ids)):
        with torch.no_grad():
            logits = model(ids[None, max(0, t - 8) : t], use_cache=False).logits[0, -1]
        by_hand += cross_entropy(logits, ids[t]).item()
    assert scored(saved / "mha", max_length=8, stride=1).nats[2] == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_batches_do_not_matter(batch_size: int, saved: Path) -> None:
    one = scored(saved / "mka", max_length=16, stride=5)
    assert scored(
        saved / "mka", max_length=16, stride=5, batch_size=batch_size
    ).nats == pytest.approx(one.nats, 1e-5)


def test_windows_by_hand() -> None:
    assert [*windows(10, 4, 4)] == [Window(0, 0, 4), Window(4, 4, 8), Window(6, 8, 10)]
    assert [*windows(7, 4, 2)] == [Window(0, 0, 4), Window(2, 4, 6), Window(3, 6, 7)]
    assert [*windows(3, 4, 1)] == [Window(0, 0, 3)]
    assert [*windows(0, 4, 4)] == []


@pytest.mark.parametrize(
    ("tokens", "length", "stride"), [(1, 1, 1), (100, 7, 3), (64, 64, 64), (65, 64, 64)]
)
def test_every_token_is_predicted_once(tokens: int, length: int, stride: int) -> None:
    parts = [*windows(tokens, length, stride)]
    assert [t for part in parts for t in range(part.first, part.end)] == list(range(tokens))
    assert all(part.begin <= part.first and part.end - part.begin <= length for part in parts)


def test_positions_by_hand() -> None:
    long = np.arange(300.0)[None] + np.array([[0.0], [2.0]])
    scores = Perplexity(np.ones(2), np.ones(2), long, 300, 300)
    found = [(begin, end, estimate.value) for begin, end, estimate in scores.by_position()]
    assert found == [(0, 64, 32.5), (64, 256, 160.5), (256, 300, 278.5)]
    assert [*replace(scores, long=np.empty((0, 300))).by_position()] == []


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main(["eval", "perplexity", *map(str, arguments)])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def test_the_command(saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "text.json"
    command = [
        "--model",
        saved / "mka",
        "--dataset",
        "text",
        "--text_path",
        saved / "text",
        "--split",
        "train",
    ]
    status, out, _ = run(
        capsys, *command, "--max_length", 100, "--output", output, "--baseline", saved / "mha"
    )
    assert status == 0
    found = json.loads(output.read_text())
    assert found["documents"] == 12
    for name in ("loss", "token_perplexity", "word_perplexity", "bits_per_byte"):
        assert found[name]["low"] <= found[name]["value"] <= found[name]["high"]
        assert f"{found[name]['value']:,.4f}" in out or f"{found[name]['value']:.3e}" in out
    for unit in ("nats per token", "per token of this tokenizer", "per word", "bits per byte"):
        assert unit in out
    assert [row[:2] for row in found["by_position"]] == [[0, 64], [64, 100]]
    assert found["difference"]["verdict"] in out


def test_a_model_does_not_differ_from_itself(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = [
        "--model",
        saved / "mha",
        "--dataset",
        "text",
        "--text_path",
        saved / "text",
        "--split",
        "train",
    ]
    _, out, _ = run(capsys, *command, "--baseline", saved / "mha", "--max_tokens", 3000)
    assert "+0.0000  (+0.0000 to +0.0000)  bits per byte, not distinguishable" in out


def test_one_document_has_no_interval(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "one.txt").write_text(story(1, 500))
    command = [
        "--model",
        saved / "mha",
        "--dataset",
        "text",
        "--text_path",
        tmp_path / "one.txt",
        "--split",
        "train",
    ]
    output = tmp_path / "one.json"
    status, out, _ = run(capsys, *command, "--baseline", saved / "mka", "--output", output)
    assert status == 0
    assert "one document: no interval can be computed" in out
    for name in (
        "loss",
        "token perplexity",
        "word perplexity",
        "bits per byte",
        "0 to 63",
        "against",
    ):
        (line,) = (line for line in out.splitlines() if line.startswith(name) and "(" in line)
        assert "(no interval)" in line
    assert "bits per byte, no verdict" in out
    found = json.loads(
        output.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is no JSON")
    )
    assert found["token_perplexity"]["value"] == pytest.approx(math.exp(found["loss"]["value"]))
    assert (found["token_perplexity"]["low"], found["difference"]["high"]) == (None, None)


def test_a_perplexity_beyond_every_number_is_said() -> None:
    loss = np.array([800.0, 801.0])
    one = np.ones(2)
    scores = Perplexity(loss, one, np.empty((0, 4)), 4, 4)
    assert shown(scores.loss).startswith("    800.5000  (800.0000 to")
    assert shown(scores.token_perplexity).strip() == "above 1e308  (above 1e308 to above 1e308)"


BAD = {
    "--model none": "model is 'none'",
    "--model MKA --dataset novel": "unknown dataset 'novel'",
    "--model MKA --split future": "future",
    "--model MKA --stride 0": "stride is 0; it must be at least 1",
    "--model MKA --max_length 8 --stride 9": "stride is 9; a window has 8 tokens",
    "--model MKA --max_tokens 0": "max_tokens is 0; it must be at least 1",
    "--model MKA --dataset text": "text_path",
    "--model MKA --baseline none": "baseline is 'none'",
}


@pytest.mark.parametrize("command", BAD)
def test_bad_input_is_one_line(
    command: str, saved: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    text = [] if "--dataset" in command else ["--dataset", "text", "--text_path", saved / "text"]
    arguments = command.replace("MKA", str(saved / "mka")).split()
    status, _, err = run(
        capsys,
        *arguments,
        *text,
        "--max_length" if "max_length" not in command else "--batch_size",
        8,
    )
    assert status == 2
    assert BAD[command] in err
    assert len(err.splitlines()) == 1
