"""Studies: named sets of trainings, their settings, and variants beside the mechanisms they
vary."""

import json

import pytest

from mka import cli
from mka.attention import build_attention
from mka.errors import InputError
from mka.record.config import PRESETS, BenchmarkConfig, attention_options
from mka.record.studies import STUDIES
from tiny_runs import Place, end


@pytest.mark.parametrize("name", STUDIES)
def test_every_arm_of_every_study_can_be_built_and_has_a_name_of_its_own(name: str) -> None:
    config = BenchmarkConfig(study=name).resolved()
    assert len({arm.name for arm in config.arms}) == len(config.arms)
    for arm in config.arms:
        options = attention_options(arm.attention_type, config) | dict(arm.options)
        built = build_attention(arm.attention_type, hidden_size=64, num_heads=8, **options)
        assert all(getattr(built, option, value) == value for option, value in arm.options.items())


def test_the_small_study_is_what_it_should_be() -> None:
    """All six and mha with a window, three seeds, equal parameters, two million tokens or more."""
    config = BenchmarkConfig(study="small").resolved()
    assert {arm.name for arm in config.arms} == {
        "mha",
        "mha-w128",
        "mqa",
        "gqa",
        "mla",
        "mka",
        "fmka",
    }
    assert (config.seeds, config.match, config.preset) == ((0, 1, 2), "parameters", "quick")
    assert config.max_steps is not None
    assert config.max_steps * config.batch_size * config.sequence_length >= 2_000_000


def test_what_the_command_line_gives_comes_before_the_study() -> None:
    config = BenchmarkConfig(study="small", seeds=(7,), max_steps=3, match="flops").resolved()
    assert (config.seeds, config.max_steps, config.match) == ((7,), 3, "flops")
    assert BenchmarkConfig(study="small", match="none").resolved().match == "none"
    assert BenchmarkConfig(study="small", epochs=1).resolved().max_steps is None
    assert [
        arm.name for arm in BenchmarkConfig(study="top_k", attention_type=("mka",)).resolved().arms
    ] == ["mka", "mka-K2", "mka-K8"]


def test_without_a_study_seeds_and_steps_are_the_presets() -> None:
    config = BenchmarkConfig().resolved()
    assert (config.seeds, config.max_steps, config.match) == (
        (0,),
        PRESETS["quick"].max_steps,
        "none",
    )


def test_mistakes_are_one_line() -> None:
    with pytest.raises(InputError, match=r"unknown study 'windwo'.*nearest: 'window'"):
        BenchmarkConfig(study="windwo").resolved()
    with pytest.raises(InputError, match="attention_type is mha; study 'levels' has none of them"):
        BenchmarkConfig(study="levels", attention_type=("mha",)).resolved()


def test_variants_are_trained_kept_apart_and_not_trained_twice(place: Place) -> None:
    command = [
        *place.options,
        "--output_dir",
        "run",
        "--study",
        "levels",
        "--attention_type",
        "mka",
        "--seeds",
        "0",
    ]
    command += ["--max_steps", "2", "--local_window", "8", "--chunk_size", "4"]
    assert end(cli.bench, *command).status == 0
    rows = place.rows()
    assert [row["variant"] for row in rows] == ["", "no-L2", "no-L3", "L1-alone"]
    assert [row["config"]["top_k"] for row in rows] == [4, 4, 0, 0]
    assert [row["config"]["session_decay"] for row in rows] == ["learned", None, "learned", None]
    assert len({row["eval_loss"] for row in rows}) == len(rows)
    for row in rows:
        name = f"mka-{row['variant']}" if row["variant"] else "mka"
        saved = json.loads(
            (place.folder / "run" / "models" / f"{name}-seed0" / "config.json").read_text()
        )
        assert saved["attention_options"]["top_k"] == row["config"]["top_k"]
        assert (place.folder / "run" / "curves" / f"{name}-seed0.jsonl").is_file()
    before = (place.folder / "run" / "results.jsonl").read_bytes()
    again = end(cli.bench, *command)
    assert again.out.count("is already in") == len(rows)
    assert "MKA no-L2 - MKA: " in again.out
    assert (place.folder / "run" / "results.jsonl").read_bytes() == before


def test_studies_of_the_same_settings_share_what_they_have_in_common(place: Place) -> None:
    command = [
        *place.options,
        "--output_dir",
        "run",
        "--attention_type",
        "mka",
        "--seeds",
        "0",
        "--max_steps",
        "1",
    ]
    assert end(cli.bench, *command, "--study", "decay").status == 0
    shared = end(cli.bench, *command, "--study", "routing")
    assert "MKA with seed 0 is already in" in shared.out
    assert len(place.rows()) == 2
