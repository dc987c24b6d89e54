"""One folder, one configuration: a rerun does what is missing, and nothing finished is ever lost or
mixed up."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mka.errors import InputError
from mka.experiments import benchmark
from mka.experiments.folder import agree_with_folder, choose_folder, describe, open_folder, short
from mka.record.config import BenchmarkConfig
from mka.record.results import read_results
from tiny_runs import TINY, Place, fingerprint, finished_run, with_copy, write_corpus

THREE = ("--attention_type", "mha", "mqa", "gqa")


@pytest.fixture(scope="module")
def finished(tiny_place: Place) -> Path:
    """A run of three mechanisms; not to be changed."""
    return finished_run(tiny_place, *THREE)


@pytest.fixture
def copied(place: Place, finished: Path) -> Place:
    """A copy of it, to be changed."""
    return with_copy(place, finished)


def lines(place: Place) -> list[bytes]:
    return (place.folder / "run" / "results.jsonl").read_bytes().splitlines(keepends=True)


def put(place: Place, kept: list[bytes]) -> None:
    (place.folder / "run" / "results.jsonl").write_bytes(b"".join(kept))


def ran(out: str) -> list[str]:
    return [line.split()[2].rstrip(".") for line in out.splitlines() if line.startswith("🏁")]


def skipped(out: str) -> list[str]:
    return [line.split()[1] for line in out.splitlines() if line.startswith("✅")]


def test_a_finished_run_does_nothing_again(copied: Place) -> None:
    before = lines(copied)
    ended = copied.bench(*THREE)
    assert (ended.status, ended.err) == (0, "")
    assert lines(copied) == before
    assert ran(ended.out) == []
    assert skipped(ended.out) == ["MHA", "MQA", "GQA"]
    assert f"✅ GQA with seed 0 is already in {copied.folder}/run/results.jsonl" in ended.out


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_removed_row_is_run_again(copied: Place, missing: int) -> None:
    before = lines(copied)
    kinds = ["MHA", "MQA", "GQA"]
    put(copied, before[:missing] + before[missing + 1 :])
    ended = copied.bench(*THREE)
    assert ran(ended.out) == [kinds[missing]]
    lost = f"results.jsonl has lost the result of {kinds[missing].lower()}-seed0"
    assert ended.err == f"warning: {copied.folder}/run: {lost}\n"
    assert skipped(ended.out) == kinds[:missing] + kinds[missing + 1 :]
    assert lines(copied)[:2] == before[:missing] + before[missing + 1 :]
    again, first = json.loads(lines(copied)[2]), json.loads(before[missing])
    assert (again["attention_type"], again["eval_loss"]) == (
        first["attention_type"],
        first["eval_loss"],
    )


@pytest.mark.parametrize("left", [1, 300, -2])
def test_a_torn_last_line_is_run_again(copied: Place, left: int) -> None:
    before = lines(copied)
    put(copied, [*before[:2], before[2][:left]])
    ended = copied.bench(*THREE)
    cut = f"warning: {copied.folder}/run: results.jsonl is cut in line 3: that line was skipped\n"
    lost = f"warning: {copied.folder}/run: results.jsonl has lost the result of gqa-seed0\n"
    assert (ended.status, ended.err) == (0, f"{cut}{lost}{cut}"), (
        "before the training, and beside the table"
    )
    assert ran(ended.out) == ["GQA"]
    assert lines(copied)[:2] == before[:2]
    assert [row.attention_type for row in read_results(copied.folder / "run")] == [
        "mha",
        "mqa",
        "gqa",
    ]
    assert ran(copied.bench(*THREE).out) == []


def test_more_mechanisms_and_seeds_are_added(copied: Place) -> None:
    ended = copied.bench("--attention_type", "mla", "mha", "--seeds", 1, 0)
    assert copied.keys() == [("mha", 0), ("mqa", 0), ("gqa", 0), ("mla", 1), ("mha", 1), ("mla", 0)]
    assert skipped(ended.out) == ["MHA"]
    for name in ("MHA", "MQA", "GQA", "MLA"):
        assert any(line.startswith(f" {name} ") for line in ended.out.splitlines()), (
            "the table is of the whole folder"
        )


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--learning_rate", 1e-4], "learning_rate is 0.003 there and 0.0001 here"),
        (["--max_steps", 4], "max_steps is 3 there and 4 here"),
        (["--epochs", 1], "epochs is null there and 1 here"),
        (["--batch_size", 3], "global_batch_size is 2 there and 3 here"),
        (["--gradient_accumulation_steps", 2], "global_batch_size is 2 there and 4 here"),
        (["--top_k", 1], "top_k is 4 there and 1 here"),
        (["--fp16"], 'precision is "'),
        (["--match", "parameters"], 'match is "none" there and "parameters" here'),
        (["--tokenizer", "gpt2"], 'tokenizer is "bpe" there and "gpt2" here'),
    ],
    ids=str,
)
def test_another_configuration_is_refused(copied: Place, options: list[object], field: str) -> None:
    before = fingerprint(copied.folder)
    complaint = copied.bench(*THREE, *options).complaint
    assert complaint.startswith(
        f"benchmark.py: {copied.folder}/run holds a different configuration: {field}"
    )
    assert complaint.endswith("choose another --output_dir")
    assert fingerprint(copied.folder) == before


def test_another_text_under_the_same_name_is_refused(place: Place) -> None:
    changing = Place(place.folder, write_corpus(place.folder / "corpus.txt", 12_000))
    assert changing.bench("--attention_type", "mqa", "--max_steps", 1).status == 0
    changing.corpus.write_text("# changed\n" + changing.corpus.read_text())
    before = fingerprint(place.folder)
    complaint = changing.bench("--attention_type", "mqa", "--max_steps", 1).complaint
    assert "different configuration: data.corpus_fingerprint is" in complaint
    assert fingerprint(place.folder) == before


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\xff"])
def test_a_foreign_config_json_is_refused(place: Place, content: str) -> None:
    folder = place.folder / "run"
    folder.mkdir()
    (folder / "config.json").write_text(content, encoding="latin-1")
    before = fingerprint(place.folder)
    assert "config.json is not the config.json of a run" in place.bench().complaint
    assert fingerprint(place.folder) == before


def test_results_of_another_schema_are_refused_before_anything_is_written(copied: Place) -> None:
    put(copied, [*lines(copied)[:2], b'{"schema_version": 99}\n'])
    before = fingerprint(copied.folder)
    stamps = {path: path.stat().st_mtime_ns for path in (copied.folder / "run").rglob("*")}
    assert (
        "results.jsonl line 3 is not a result of schema version 1" in copied.bench(*THREE).complaint
    )
    assert fingerprint(copied.folder) == before
    assert stamps == {path: path.stat().st_mtime_ns for path in (copied.folder / "run").rglob("*")}


def test_a_folder_with_foreign_files_is_refused(place: Place) -> None:
    folder = place.folder / "run"
    folder.mkdir()
    (folder / "thesis.txt").write_text("precious")
    before = fingerprint(place.folder)
    complaint = place.bench().complaint
    assert complaint == (
        f"benchmark.py: {folder} is not empty and holds no config.json of a run; choose "
        "another --output_dir"
    )
    assert fingerprint(place.folder) == before


def test_an_empty_folder_is_taken(place: Place) -> None:
    (place.folder / "run").mkdir()
    assert place.bench("--attention_type", "mqa", "--max_steps", 1).status == 0


@pytest.mark.parametrize("name", ["with space", "[red]", "[/x]", ":smile:", "naïve 記憶"])
def test_a_folder_of_any_name(place: Place, name: str) -> None:
    ended = place.bench("--attention_type", "mqa", "--max_steps", 1, output=name)
    assert (ended.status, ended.err) == (0, "")
    assert place.keys(name) == [("mqa", 0)]
    assert f"Results    {place.folder}/{name}\n" in ended.out
    assert f"Results  {place.folder}/{name}/results.jsonl\n" in ended.out
    assert (
        f"is already in {place.folder}/{name}/"
        in place.bench("--attention_type", "mqa", "--max_steps", 1, output=name).out
    )


def fail_at(monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException) -> None:
    build = benchmark.build_model

    def build_or_fail(config: Any, kind: str, *rest: Any, **options: Any) -> Any:
        if kind == failing:
            raise error
        return build(config, kind, *rest, **options)

    monkeypatch.setattr(benchmark, "build_model", build_or_fail)


def test_a_failure_in_the_third_leaves_the_first_two(place: Place) -> None:
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, "gqa", RuntimeError("out of memory"))
        with pytest.raises(RuntimeError, match="out of memory"):
            place.bench(*THREE)
    assert place.keys() == [("mha", 0), ("mqa", 0)]
    before = lines(place)
    assert place.bench(*THREE).status == 0
    assert lines(place)[:2] == before
    assert place.keys() == [("mha", 0), ("mqa", 0), ("gqa", 0)]


# ---- where results go when no folder is named


def description(**changes: Any) -> dict[str, Any]:
    config = BenchmarkConfig(
        preset="tiny", dataset="text", text_path=("a.txt",), **changes
    ).resolved()
    return describe(config, {"corpus_fingerprint": "ab"}, "float32")


def described(num_ranks: int, batch_size: int = 2) -> dict[str, Any]:
    config = BenchmarkConfig(preset="quick", dataset="stdlib", batch_size=batch_size).resolved()
    return describe(config, {"corpus_fingerprint": "ab"}, "float32", num_ranks)


def chosen(precision: str = "float32", **changes: Any) -> Path:
    config = BenchmarkConfig(
        preset="tiny", dataset="text", text_path=("a.txt",), **changes
    ).resolved()
    return choose_folder(config, describe(config, {"corpus_fingerprint": "ab"}, precision))


def test_the_default_folder_is_the_configurations_own(tiny_place: Place) -> None:
    assert chosen() == chosen()
    assert chosen().parent == Path("runs")
    assert chosen().name.startswith("tiny-text-")
    assert chosen(attention_type=("mka",), seeds=(1, 2)) == chosen(), (
        "which rows are wanted is not what they mean"
    )
    assert chosen(max_steps=TINY.max_steps) == chosen(), (
        "the preset's value given by hand is the same value"
    )
    assert chosen(output_dir="elsewhere") == Path("elsewhere")
    others = [
        chosen(learning_rate=1e-4),
        chosen(max_steps=4),
        chosen(epochs=3),
        chosen(top_k=2),
        chosen(local_window=None),
        chosen(session_decay=0.9),
        chosen(session_decay=None),
        chosen(match="parameters"),
        chosen(precision="bfloat16"),
    ]
    assert len({chosen(), *others}) == len(others) + 1


def test_a_run_without_a_folder_goes_there_and_comes_back(place: Place) -> None:
    """The current folder is the test's own."""
    for _ in range(2):
        assert place.bench("--attention_type", "mqa", "--max_steps", 1, output=None).status == 0
    [folder] = (place.folder / "runs").iterdir()
    assert folder.name.startswith("tiny-text-")
    assert place.keys(f"runs/{folder.name}") == [("mqa", 0)]
    assert place.bench("--attention_type", "mqa", "--max_steps", 2, output=None).status == 0
    assert len(list((place.folder / "runs").iterdir())) == 2


def test_a_description_survives_json(tiny_place: Place) -> None:
    shared = description(session_decay=0.5)
    assert json.loads(json.dumps(shared)) == shared
    assert shared["text_path"] == ["a.txt"]


def test_open_folder_tells_what_is_finished(finished: Path, tmp_path: Path) -> None:
    held = json.loads((finished / "config.json").read_text(encoding="utf-8"))
    assert open_folder(tmp_path / "new", held, {}) == set()
    copy = shutil.copytree(finished, tmp_path / "copy")
    assert open_folder(copy, held, {"changed": 1}) == {("mha", 0), ("mqa", 0), ("gqa", 0)}
    assert json.loads((copy / "environment.json").read_text()) == {"changed": 1}


def test_agreeing_with_a_folder_writes_nothing(finished: Path, tmp_path: Path) -> None:
    held = json.loads((finished / "config.json").read_text(encoding="utf-8"))
    before = fingerprint(finished)
    assert (
        agree_with_folder(finished, held) == agree_with_folder(finished, held, resume=True) == held
    )
    assert agree_with_folder(tmp_path / "new", held) == held
    with pytest.raises(InputError, match=r"surprise is null there and 1 here"):
        agree_with_folder(finished, held | {"surprise": 1})
    assert fingerprint(finished) == before
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(("started", "now"), [(1, 2), (4, 1), (2, 8)])
def test_another_number_of_ranks_keeps_the_global_batch(
    tmp_path: Path, started: int, now: int
) -> None:
    """The same command on more or fewer ranks is the same run; another --batch_size is not."""
    first, again = described(started), described(now)
    open_folder(tmp_path / "run", first, {})
    assert first["global_batch_size"] == 2 * started
    assert agree_with_folder(tmp_path / "run", again) == first
    with pytest.raises(
        InputError, match=rf"global_batch_size is {2 * started} there and {16 * now} here"
    ):
        agree_with_folder(tmp_path / "run", described(now, batch_size=16))


def test_long_values_are_cut_short() -> None:
    assert short("x") == '"x"'
    assert len(short(list(range(100)))) == 60
