"""mka verify: a line for each file of a run or of a saved model, and status 1 if one is not
whole."""

import shutil
from pathlib import Path

import pytest

from mka import cli
from mka.record.results import RunFolder
from tiny_runs import Ended, Place, end, fingerprint

NOTED = [
    "config.json",
    "costs.jsonl",
    "curves/mka-seed0.jsonl",
    "environment.json",
    "routing/mka-seed0.json",
]
MODEL = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


@pytest.fixture(scope="module")
def finished(tiny_place: Place) -> Path:
    """Not to be changed."""
    assert tiny_place.bench("--attention_type", "mka", "--max_steps", 1).status == 0
    return tiny_place.folder / "run"


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished, tmp_path / "run")


def verify(folder: Path) -> Ended:
    before = fingerprint(folder)
    ended = end(cli.main, "verify", folder)
    assert fingerprint(folder) == before, "it only reads"
    return ended


def not_whole(ended: Ended) -> list[str]:
    """The lines of what is not whole; the last one counts them."""
    *lines, last = ended.out.splitlines()
    found = [line for line in lines if not line.endswith((": whole", "accepted as it is"))]
    assert (ended.status, ended.err) == (int(bool(found)), "")
    assert last == f"{sum(line.endswith(': whole') for line in lines)} whole, {len(found)} not"
    return found


def test_everything_is_named(run: Path) -> None:
    ended = verify(run)
    assert not_whole(ended) == []
    lines = [
        "results.jsonl line 1, mka-seed0",
        *NOTED,
        *(f"models/mka-seed0/{name}" for name in MODEL),
    ]
    assert ended.out.splitlines() == [*(f"{line}: whole" for line in lines), "10 whole, 0 not"]


def test_a_model_by_itself(run: Path) -> None:
    ended = verify(run / "models" / "mka-seed0")
    assert ended.out.splitlines() == [*(f"{name}: whole" for name in MODEL), "4 whole, 0 not"]


@pytest.mark.parametrize("name", [*NOTED, *(f"models/mka-seed0/{name}" for name in MODEL)])
def test_a_file_that_is_altered_or_missing_is_named(run: Path, name: str) -> None:
    raw = bytearray((run / name).read_bytes())
    raw[len(raw) // 2] ^= 4
    (run / name).write_bytes(raw)
    assert not_whole(verify(run)) == [f"{name}: altered"]
    (run / name).unlink()
    assert not_whole(verify(run)) == [f"{name}: missing"]


def test_a_manifest_that_is_altered_is_named(run: Path) -> None:
    for name in ("manifest.json", "models/mka-seed0/manifest.json"):
        (run / name).write_bytes((run / name).read_bytes()[:-9])
    assert not_whole(verify(run)) == [
        "manifest.json: altered",
        "models/mka-seed0/manifest.json: altered",
    ]


def test_lines_that_are_altered_cut_or_gone_are_named(run: Path) -> None:
    whole = RunFolder(run).results.read_bytes()
    RunFolder(run).results.write_bytes(
        whole.replace(b'"perplexity": ', b'"perplexity": 1', 1) + b'{"attention_'
    )
    lost = "results.jsonl, mka-seed0: missing"
    assert not_whole(verify(run)) == [
        "results.jsonl line 1: altered",
        "results.jsonl line 2: cut",
        lost,
    ]
    RunFolder(run).results.unlink()
    assert not_whole(verify(run)) == [lost]


def test_checkpoints_are_looked_at(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mka.training.checkpoint.Checkpoints.clear", lambda self: None)
    assert place.bench("--attention_type", "mqa", "--save_steps", 1).status == 0
    run, step = place.folder / "run", "checkpoints/mqa-seed0/step-00000002"
    assert f"{step}/optimizer.safetensors: whole" in verify(run).out
    (run / step / "progress.json").write_text("{}")
    assert not_whole(verify(run)) == [f"{step}/progress.json: altered"]
    (run / step / "manifest.json").unlink()
    assert not_whole(verify(run)) == [f"{step}/manifest.json: missing"]


def test_an_old_folder_is_taken_as_it_is(run: Path) -> None:
    for manifest in run.rglob("manifest.json"):
        manifest.unlink()
    (run / "costs.jsonl").unlink()
    ended = verify(run)
    assert not_whole(ended) == []
    assert ended.out.splitlines() == [
        "results.jsonl line 1, mka-seed0: whole",
        ".: has no manifest.json, accepted as it is",
        "models/mka-seed0: has no manifest.json, accepted as it is",
        "1 whole, 0 not",
    ]


def test_results_of_an_older_schema_have_no_checksum(tmp_path: Path) -> None:
    study = Path(__file__).parent.parent.parent / "docs" / "study" / "window64.jsonl"
    shutil.copy(study, RunFolder(tmp_path).results)
    ended = verify(tmp_path)
    assert not_whole(ended) == []
    assert ended.out.count(": has no checksum, accepted as it is\n") == 4


def test_a_folder_with_nothing_to_verify_is_refused(tmp_path: Path) -> None:
    nothing = "holds neither results.jsonl nor manifest.json"
    for folder, what in ((tmp_path, nothing), (tmp_path / "nowhere", "does not exist")):
        assert end(cli.main, "verify", folder).complaint == (
            f"mka: {folder} {what}; give the folder of a `mka bench` run or of a saved model"
        )
