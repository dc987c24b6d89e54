"""A file that is altered is refused by every command that reads it, in one line, before anything is
written."""

import json
import shutil
from pathlib import Path

import pytest

from mka import cli
from mka.record.results import RunFolder, read_results
from tiny_runs import Place, end, fingerprint, finished_run, with_copy

BENCH = ("--attention_type", "mka", "--max_steps", 1, "--local_window", 8, "--chunk_size", 4)
MODEL = "run/models/mka-seed0"


@pytest.fixture(scope="module")
def finished(tiny_place: Place) -> Path:
    """Not to be changed."""
    return finished_run(tiny_place, *BENCH)


@pytest.fixture
def copied(finished: Path, place: Place) -> Place:
    return with_copy(place, finished)


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def refused(place: Place, path: Path, words: tuple[object, ...]) -> None:
    before = fingerprint(place.folder)
    entry = cli.bench if words[0] == "--preset" else cli.main
    complaint = end(entry, *words).complaint
    assert (
        f"{path.relative_to(place.folder)} is altered: it is not as it was written; put it "
        "back, or delete "
    ) in complaint
    assert fingerprint(place.folder) == before


@pytest.mark.parametrize(
    "name", ["config.json", "environment.json", "costs.jsonl", "routing/mka-seed0.json"]
)
def test_a_file_of_a_run(copied: Place, name: str) -> None:
    path = copied.folder / "run" / name
    flip(path)
    again = (*copied.options, "--output_dir", copied.folder / "run", *BENCH, "--seeds", 1)
    for words in (("report", copied.folder / "run"), again):
        refused(copied, path, words)
    (copied.folder / "run" / "manifest.json").unlink()
    if name == "environment.json":
        assert copied.bench(*BENCH).status == 0, "it is taken as it is"


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
)
def test_a_file_of_a_model(copied: Place, name: str) -> None:
    model, text = copied.folder / MODEL, ("--dataset", "text", "--text_path", copied.corpus)
    flip(model / name)
    (copied.folder / "prompt.txt").write_text("def f(x):\n")
    for words in (
        ("generate", "--model", model, "--prompt", "def"),
        ("chat", "--model", model),
        ("eval", "perplexity", "--model", model, *text),
        ("eval", "router", "--model", model, *text),
        ("eval", "needle", "--model", model),
        ("eval", "recall", "--model", model),
        (
            "memory",
            "add",
            copied.folder / "prompt.txt",
            "--model",
            model,
            "--bank",
            copied.folder / "bank",
        ),
        (*copied.options, "--tokenizer", model, "--output_dir", copied.folder / "other"),
    ):
        refused(copied, model / name, words)


def test_a_model_that_was_edited_on_purpose(copied: Place) -> None:
    """The line says what to delete, and then it is read as it is."""
    model = copied.folder / MODEL
    held = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(held | {"top_k": 1}))
    generate = ("generate", "--model", model, "--prompt", "def", "--max_new_tokens", 2)
    assert (
        f"or delete {model / 'manifest.json'} to accept the folder as it is"
        in end(cli.main, *generate).complaint
    )
    (model / "manifest.json").unlink()
    assert end(cli.main, *generate).status == 0


def test_a_model_that_was_copied_is_still_checked(copied: Place) -> None:
    copy = shutil.copytree(copied.folder / MODEL, copied.folder / "copy")
    generate = ("generate", "--model", copy, "--prompt", "def", "--max_new_tokens", 2)
    assert end(cli.main, *generate).status == 0
    flip(copy / "model.safetensors")
    refused(copied, copy / "model.safetensors", generate)


def test_a_line_of_results(copied: Place) -> None:
    path = RunFolder(copied.folder / "run").results
    path.write_bytes(path.read_bytes().replace(b'"perplexity": ', b'"perplexity": 1', 1))
    before = fingerprint(copied.folder)
    for ended in (end(cli.main, "report", copied.folder / "run"), copied.bench(*BENCH)):
        assert (
            "results.jsonl line 1 is altered: its checksum does not fit; take the line out"
            in ended.complaint
        )
    assert fingerprint(copied.folder) == before
    path.write_bytes(b"")
    ended = copied.bench(*BENCH)
    assert (ended.status, ended.err) == (
        0,
        f"warning: {copied.folder / 'run'}: results.jsonl has lost the result of mka-seed0\n",
    )


def test_what_is_missing_is_said_and_the_report_drawn(copied: Place) -> None:
    run = copied.folder / "run"
    (run / "curves" / "mka-seed0.jsonl").unlink()
    ended = end(cli.main, "report", run, "--html", copied.folder / "page.html")
    assert (ended.status, ended.err) == (0, f"warning: {run}: curves/mka-seed0.jsonl is missing\n")
    assert "curves/mka-seed0.jsonl is missing." in (copied.folder / "page.html").read_text(
        encoding="utf-8"
    )
    (run / "costs.jsonl").unlink()
    assert "warning: " in copied.bench(*BENCH).err
    assert (run / "costs.jsonl").is_file(), "what a run observes it observes again"
    assert end(cli.main, "verify", run).status == 0


def test_a_folder_of_an_earlier_version_goes_on(copied: Place) -> None:
    """Without manifests, and with results of the third schema: read as it is, and under a manifest
    from then on."""
    run = copied.folder / "run"
    for manifest in run.rglob("manifest.json"):
        manifest.unlink()
    rows = [json.loads(line) for line in RunFolder(run).results.read_text().splitlines()]
    old = [
        {name: value for name, value in row.items() if name != "checksum"} | {"schema_version": 3}
        for row in rows
    ]
    RunFolder(run).results.write_text(
        "".join(json.dumps(row, sort_keys=True) + "\n" for row in old)
    )
    assert end(cli.main, "report", run).err == ""
    ended = copied.bench(*BENCH, "--seeds", 0, 1)
    assert (ended.status, ended.err) == (0, "")
    assert [row.seed for row in read_results(run)] == [0, 1]
    flip(run / "curves" / "mka-seed0.jsonl")
    refused(copied, run / "curves" / "mka-seed0.jsonl", ("report", run))
