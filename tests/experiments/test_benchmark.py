"""A whole comparison: what it leaves behind, how long it trains, and that it gives the same numbers
again."""

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch

from checks import TOLERANCE
from mka.data import load_corpus, prepare_tokens
from mka.evaluation import HeldOutLoss
from mka.record.mechanisms import MECHANISMS
from mka.record.results import CurvePoint, Result, read_curve, read_results
from tiny_runs import TINY, Place

SCHEMA = {
    *(
        "schema_version",
        "attention_type",
        "seed",
        "train_loss",
        "eval_loss",
        "perplexity",
        "bits_per_byte",
    ),
    *("train_seconds", "eval_seconds", "tokens_per_second", "parameters", "cache_bytes_per_token"),
    *(
        "memory_allocated",
        "memory_reserved",
        "busy_cores",
        "config",
        "environment",
        "eval_block_losses",
        "flops_per_token",
    ),
}
MEASURED = (
    *(
        "train_seconds",
        "eval_seconds",
        "tokens_per_second",
        "memory_allocated",
        "memory_reserved",
        "busy_cores",
    ),
    "checksum",
)


@pytest.fixture(scope="module")
def six(tiny_place: Place) -> Place:
    """All six mechanisms, run once."""
    ended = tiny_place.bench()
    assert (ended.status, ended.err) == (0, "")
    return tiny_place


def numbers(place: Place, output: str = "run") -> list[dict[str, Any]]:
    """The rows without what a clock or the system measured."""
    return [
        {name: value for name, value in row.items() if name not in MEASURED}
        for row in place.rows(output)
    ]


def train_blocks(place: Place) -> int:
    corpus = prepare_tokens(load_corpus("text", [str(place.corpus)]), "bpe", TINY.vocab_size)
    return (len(corpus.splits["train"].ids) - 1) // TINY.sequence_length


def test_all_six_run_when_none_is_named(six: Place) -> None:
    assert six.keys() == [(kind, 0) for kind in MECHANISMS]


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e9])
def test_a_held_out_loss_without_a_perplexity_is_no_result(
    loss: float, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "mka.experiments.benchmark.held_out_loss", lambda *_: HeldOutLoss(loss, 1, 1, (loss,))
    )
    monkeypatch.setattr("mka.training.loop.check_finite", lambda value, _what: value)
    ended = place.bench("--attention_type", "mha")
    assert ended.status == 1
    said = (
        f"mka: mha, seed 0: the held-out loss is {loss:.6g} and its "
        "perplexity is not finite: no result\n"
    )
    assert ended.err == said
    assert not (place.folder / "run" / "results.jsonl").exists()


def test_the_folder_holds_everything(six: Place) -> None:
    folder = six.folder / "run"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    figures = {f"figures/{name}.svg" for name in ("loss_tokens", "loss_time", "perplexity_cache")}
    curves = {f"curves/{kind}-seed0.jsonl" for kind in MECHANISMS}
    loadable = (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "manifest.json",
    )
    models = {f"models/{kind}-seed0/{name}" for kind in MECHANISMS for name in loadable}
    watched = {"costs.jsonl", "routing/mka-seed0.json", "routing/fmka-seed0.json"}
    files = {
        "config.json",
        "environment.json",
        "results.jsonl",
        "table.md",
        "manifest.json",
        ".lock",
    }
    assert names == files | figures | curves | models | watched
    assert not (folder / "checkpoints").exists(), "a training that has its result needs none"


def test_rows_have_the_schema_and_make_sense(six: Place) -> None:
    for row in six.rows():
        assert set(row) >= SCHEMA
        assert set(row) == {field.name for field in fields(Result)} | {"checksum"}
        assert row["perplexity"] == pytest.approx(math.exp(row["eval_loss"]))
        assert 0 < row["train_loss"] < 7
        assert 0 < row["bits_per_byte"] < 8
        assert row["train_seconds"] > 0
        assert row["tokens_per_second"] == pytest.approx(row["train_tokens"] / row["train_seconds"])
        assert row["parameters"] > 0
        assert row["skipped_steps"] == 0
        assert row["train_tokens"] == TINY.max_steps * TINY.batch_size * TINY.sequence_length
        assert row["eval_tokens"] == TINY.eval_tokens


def test_cache_bytes_tell_the_mechanisms_apart(six: Place) -> None:
    """Two layers of 8 heads of 4, keys and values, two bytes each."""
    cache = {row["attention_type"]: row["cache_bytes_per_token"] for row in six.rows()}
    assert cache["mha"] == 2 * (2 * 8 * 4) * 2
    assert cache["gqa"] == cache["mha"] / 2  # 4 of 8 heads
    assert cache["mqa"] == cache["mha"] / 8
    assert cache["mla"] < cache["mha"]


def test_the_folder_says_what_it_is_about(six: Place) -> None:
    config = json.loads((six.folder / "run" / "config.json").read_text(encoding="utf-8"))
    assert config["model"]["hidden_size"] == TINY.hidden_size
    assert config["max_steps"] == TINY.max_steps
    assert config["global_batch_size"] == TINY.batch_size
    assert config["learning_rate"] == TINY.learning_rate
    assert (
        config["data"]["corpus_fingerprint"] == load_corpus("text", [str(six.corpus)]).fingerprint
    )
    assert not {"seeds", "attention_type", "output_dir"} & set(config)
    for row in six.rows():
        assert (
            row["config"].items()
            >= {"seeds": [0], "data": config["data"], "max_steps": TINY.max_steps}.items()
        )
        assert ("local_window" in row["config"]) == (row["attention_type"] in ("mka", "fmka"))


@pytest.mark.parametrize("kind", MECHANISMS)
def test_curves_follow_the_training(six: Place, kind: str) -> None:
    curve = read_curve(six.folder / "run", kind, 0)
    assert [point.step for point in curve] == [0, 1, 2, 3]
    assert [point.tokens for point in curve] == [64 * step for step in range(4)]
    assert curve[0].train_loss is None
    assert curve[0].eval_loss is not None, "the first look comes before training"
    assert curve[-1].eval_loss is not None, "the last look comes after it"
    assert curve[-1].seconds == next(
        row["train_seconds"] for row in six.rows() if row["attention_type"] == kind
    )
    assert curve[-1].eval_loss < curve[0].eval_loss


def test_the_table_has_a_line_for_each(six: Place) -> None:
    table = (six.folder / "run" / "table.md").read_text(encoding="utf-8")
    for row in six.rows():
        line = next(
            line
            for line in table.splitlines()
            if line.startswith(f"| {row['attention_type'].upper()} |")
        )
        assert f"{row['eval_loss']:.4f}" in line
        assert "±" not in line


def test_the_same_seed_gives_the_same_numbers(six: Place) -> None:
    assert six.bench(output="again").status == 0
    assert numbers(six) == numbers(six, "again")
    for kind in MECHANISMS:
        first, again = (read_curve(six.folder / output, kind, 0) for output in ("run", "again"))
        assert [losses(point) for point in first] == [losses(point) for point in again]


def losses(point: CurvePoint) -> tuple[float | None, float | None]:
    return point.train_loss, point.eval_loss


def test_a_mechanism_alone_gives_what_it_gives_among_others(six: Place) -> None:
    assert six.bench("--attention_type", "fmka", "mqa", output="two").status == 0
    assert numbers(six, "two") == [numbers(six)[5], numbers(six)[1]]


def test_mechanisms_run_in_the_order_given_and_once_each(place: Place) -> None:
    assert place.bench("--attention_type", "mqa", "mha", "mqa", "--max_steps", 1).status == 0
    assert place.keys() == [("mqa", 0), ("mha", 0)]


def test_several_seeds(place: Place) -> None:
    ended = place.bench("--attention_type", "mha", "fmka", "--seeds", 0, 1)
    assert ended.status == 0
    assert place.keys() == [("mha", 0), ("fmka", 0), ("mha", 1), ("fmka", 1)]
    rows = {(row["attention_type"], row["seed"]): row for row in place.rows()}
    assert rows["mha", 0]["eval_loss"] != rows["mha", 1]["eval_loss"]
    mean = (rows["mha", 0]["eval_loss"] + rows["mha", 1]["eval_loss"]) / 2
    spread = abs(rows["mha", 0]["eval_loss"] - rows["mha", 1]["eval_loss"]) / math.sqrt(2)
    table = (place.folder / "run" / "table.md").read_text(encoding="utf-8")
    assert f"{mean:.4f} ± {spread:.4f}" in table
    assert "2 seeds (0, 1)" in table
    assert f"{mean:.4f}" in ended.out
    assert f"±{spread:.4f}" in ended.out
    for line in (
        "Using Multi-Head Attention (seed 1)",
        "📊 Results for MHA (seed 1):",
        "📊 Results for FMKA (seed 0):",
    ):
        assert line in ended.out


@pytest.mark.parametrize(
    ("options", "epochs", "steps"),
    [
        ((), None, TINY.max_steps),
        (("--max_steps", 5), None, 5),
        (("--epochs", 1), 1, None),
        (("--epochs", 2, "--max_steps", 4), None, 4),
        (("--epochs", 1, "--max_steps", 1000), 1, None),
    ],
)
def test_whichever_of_epochs_and_steps_ends_first(
    place: Place, options: tuple[object, ...], epochs: int | None, steps: int | None
) -> None:
    if epochs:
        steps = math.ceil(epochs * train_blocks(place) / 64)
        assert steps > TINY.max_steps, "or the preset's own budget would not be seen"
    assert steps
    ended = place.bench("--attention_type", "mha", "--batch_size", 64, *options)
    [row] = place.rows()
    assert row["train_tokens"] == steps * 64 * TINY.sequence_length
    assert read_curve(place.folder / "run", "mha", 0)[-1].step == steps
    assert f"Budget     {steps:,} steps, {row['train_tokens']:,} tokens" in ended.out


def test_matched_parameters(place: Place) -> None:
    assert place.bench("--max_steps", 1, output="plain").status == 0
    assert place.bench("--max_steps", 1, "--match", "parameters", output="matched").status == 0
    plain, matched = (
        {row["attention_type"]: row["parameters"] for row in place.rows(output)}
        for output in ("plain", "matched")
    )
    assert matched["mha"] == plain["mha"]
    for kind in ("mqa", "gqa", "mla", "mka", "fmka"):
        assert abs(matched[kind] - plain["mha"]) <= abs(plain[kind] - plain["mha"]), kind
    assert matched["mqa"] > plain["mqa"]
    assert matched["fmka"] < plain["fmka"]


@pytest.mark.parametrize(("flag", "precision"), [("--fp16", "float16"), ("--bf16", "bfloat16")])
def test_precision_is_printed_and_recorded(place: Place, flag: str, precision: str) -> None:
    ended = place.bench("--attention_type", "gqa", "--max_steps", 2, flag)
    [row] = place.rows()
    assert row["environment"]["precision"] == precision
    assert row["config"]["precision"] == precision
    assert math.isfinite(row["eval_loss"])
    machine = next(line for line in ended.out.splitlines() if line.startswith("Machine"))
    assert machine.endswith(f", {precision}")


def test_steps_that_float16_skipped_are_shown(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first two of three: the scale is far too large, and is halved in each."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**60, backoff_factor=2.0**-25)
    monkeypatch.setattr("mka.training.Precision.scaler", lambda precision: scaler)
    ended = place.bench("--attention_type", "gqa", "--fp16")
    assert ended.status == 0
    assert "  Skipped Steps: 2\n" in ended.out
    [row] = place.rows()
    assert row["skipped_steps"] == 2
    assert "skipped steps" in (place.folder / "run" / "table.md").read_text(encoding="utf-8")


def test_activations_computed_twice_give_the_same_losses(six: Place) -> None:
    words = ("--attention_type", "mha", "fmka", "--gradient_checkpointing")
    ended = six.bench(*words, output="twice")
    assert (ended.status, ended.err) == (0, "")
    for row in six.rows("twice"):
        assert row["environment"]["launch"]["gradient_checkpointing"]
        kept = next(kept for kept in six.rows() if kept["attention_type"] == row["attention_type"])
        assert row["config"] == kept["config"], "how it is carried out is not what a row means"
        assert row["train_loss"] == pytest.approx(kept["train_loss"], rel=TOLERANCE[torch.float32])


def test_without_a_flag_the_choice_is_the_processors(
    six: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    for has, name in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr("mka.training.precision.has_bfloat16", lambda device, has=has: has)
        assert six.bench("--attention_type", "mha", "--max_steps", 1, output=name).status == 0
        assert six.rows(name)[0]["environment"]["precision"] == name


def test_a_result_is_safe_before_it_is_announced(place: Place) -> None:
    """What on_result is called with is already in the file."""
    from rich.console import Console

    from mka.experiments import run_benchmark
    from mka.record.config import BenchmarkConfig

    seen: list[Result] = []

    def on_result(result: Result) -> None:
        seen.append(result)
        assert read_results(place.folder / "run") == seen

    config = BenchmarkConfig(
        preset="tiny",
        dataset="text",
        text_path=(str(place.corpus),),
        attention_type=("mha", "mla"),
        max_steps=1,
        output_dir=str(place.folder / "run"),
    )
    assert run_benchmark(config, Console(quiet=True), on_result) == Path(place.folder / "run")
    assert [result.attention_type for result in seen] == ["mha", "mla"]
