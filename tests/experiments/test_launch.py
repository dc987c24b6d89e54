"""How a run is started: who started it, how a step's rows are divided, and what is refused before
the ranks meet."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mka import cli
from mka.distributed import Ranks
from mka.errors import InputError
from mka.experiments import environment, progress
from mka.experiments.environment import accumulation, describe_launch, read_deepspeed, started_by
from mka.record.config import BenchmarkConfig
from thread_ranks import Meeting, ThreadAccelerator
from tiny_runs import Place, end, fingerprint

LAUNCHERS = (
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "TORCHELASTIC_RUN_ID",
    "CROSS_RANK",
)


@pytest.fixture(autouse=True)
def started_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("batch_size", range(1, 10))
def test_rows_are_divided_into_the_fewest_parts_that_fit(ranks: int, batch_size: int) -> None:
    """Every global batch up to 48 rows, against a search through all numbers of parts."""
    for rows in range(1, 49):
        fitting = [
            parts
            for parts in range(1, rows + 1)
            if rows % (ranks * parts) == 0 and rows // ranks // parts <= batch_size
        ]
        if rows % ranks == 0:
            parts = accumulation(rows, batch_size, ranks)
            assert parts == min(fitting)
            size = rows // ranks // parts
            assert (size * parts * ranks, size <= batch_size) == (rows, True)
        else:
            assert not fitting
            with pytest.raises(
                InputError, match=rf"^{ranks} ranks do not divide the global batch of {rows} rows"
            ):
                accumulation(rows, batch_size, ranks)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_a_new_run_takes_the_parts_that_were_asked_for(
    batch_size: int, ranks: int, parts: int
) -> None:
    assert accumulation(batch_size * parts * ranks, batch_size, ranks) == parts


@pytest.mark.parametrize(
    ("rows", "ranks", "allowed"),
    [(8, 3, "1, 2, 4, 8"), (12, 5, "1, 2, 3, 4, 6, 12"), (7, 2, "1, 7"), (1, 4, "1")],
)
def test_what_would_divide_is_listed(rows: int, ranks: int, allowed: str) -> None:
    with pytest.raises(InputError, match=rf"; allowed: {allowed}$"):
        accumulation(rows, 2, ranks)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "python"),
        ({"RANK": "0", "WORLD_SIZE": "1"}, "python"),
        ({"RANK": "0", "TORCHELASTIC_RUN_ID": "none"}, "torchrun"),
        ({"RANK": "0", "CROSS_RANK": "0", "CROSS_SIZE": "1"}, "deepspeed"),
    ],
)
def test_who_started_it(
    environment: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert started_by() == expected


@pytest.mark.parametrize(
    ("count", "on_each", "options", "machines", "strategy"),
    [
        (1, None, {}, 1, "one process"),
        (4, None, {}, 1, "ddp"),
        (4, "4", {"strategy": "fsdp"}, 1, "fsdp"),
        (4, "2", {}, 2, "ddp"),
        (8, "1", {"deepspeed": True}, 8, "deepspeed zero2"),
        (1, "1", {"deepspeed": True}, 1, "deepspeed zero2"),
    ],
)
def test_what_a_result_says_of_its_launch(
    count: int,
    on_each: str | None,
    options: dict[str, Any],
    machines: int,
    strategy: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if on_each:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", on_each)
    monkeypatch.setattr("mka.training.deepspeed_config.find_spec", lambda name: object())
    monkeypatch.setenv("RANK", "0")
    accelerator: Any = ThreadAccelerator(Meeting(count), 0)
    config = BenchmarkConfig(gradient_checkpointing=count == 8, **options).resolved()
    assert describe_launch(config, Ranks(accelerator), 3, read_deepspeed(config)) == {
        "started_by": "python",
        "world_size": count,
        "machines": machines,
        "strategy": strategy,
        "gradient_accumulation_steps": 3,
        "gradient_checkpointing": count == 8,
    }


# ---- refused, in one line


@pytest.fixture
def refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run the command, which must refuse before anything is written; returns its line."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(place.folder / "cache"))

    def run(*words: object) -> str:
        before = fingerprint(place.folder)
        ended = end(cli.bench, *place.options, "--output_dir", place.folder / "run", *words)
        assert fingerprint(place.folder) == before
        assert ended.out == ""
        return ended.complaint

    return run


@pytest.fixture
def deepspeed_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mka.training.deepspeed_config.find_spec", lambda name: object())


@pytest.mark.usefixtures("deepspeed_is_there")
def test_deepspeed_without_a_launcher(refused: Callable[..., str]) -> None:
    line = refused("--deepspeed")
    assert line.startswith("benchmark.py: --deepspeed needs a launcher; start it as deepspeed ")
    assert line.endswith(" --deepspeed, or by torchrun")


@pytest.mark.usefixtures("deepspeed_is_there")
def test_deepspeed_by_a_launcher_is_let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    assert read_deepspeed(BenchmarkConfig(deepspeed=True).resolved()) == {
        "zero_optimization": {"stage": 2}
    }


def test_without_deepspeed_there_is_nothing_to_read() -> None:
    assert read_deepspeed(BenchmarkConfig().resolved()) is None


def test_deepspeed_that_is_not_installed(
    refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mka.training.deepspeed_config.find_spec", lambda name: None)
    line = "benchmark.py: --deepspeed needs the package deepspeed; pip install 'mka[deepspeed]'"
    assert refused("--deepspeed") == line


@pytest.mark.usefixtures("deepspeed_is_there")
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "deepspeed_config is '{path}', which cannot be read: No such file or directory"),
        ("[", "deepspeed_config is '{path}', which is not JSON: "),
        ("{}", "zero_optimization.stage in {path} is null; allowed: 1, 2, 3"),
        ('{"train_batch_size": 4}', "train_batch_size in {path} is 4; it is set by --batch_size, "),
    ],
)
def test_a_bad_deepspeed_file(
    place: Place, refused: Callable[..., str], content: str | None, reason: str
) -> None:
    path: Path = place.folder / "ds.json"
    if content is not None:
        path.write_text(content)
    line = refused("--deepspeed", "--deepspeed_config", path)
    assert line.startswith(f"benchmark.py: {reason.format(path=path)}")


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (
            "--deepspeed --strategy fsdp",
            "--deepspeed and --strategy fsdp are both given; choose one",
        ),
        (
            "--deepspeed_config ds.json",
            "deepspeed_config is 'ds.json' without --deepspeed; give both",
        ),
        ("--save_steps -1", "save_steps is -1; it must be at least 0"),
        ("--keep_checkpoints 0", "keep_checkpoints is 0; it must be at least 1"),
        ("--ddp_timeout 0", "ddp_timeout is 0; it must be at least 1"),
    ],
)
def test_flags_that_cannot_be(refused: Callable[..., str], words: str, line: str) -> None:
    assert refused(*words.split()) == f"benchmark.py: {line}"


@pytest.mark.parametrize(
    "words", ["--strategy zero", "--strategy", "--track mlflow", "--keep_checkpoints x"]
)
def test_words_that_are_not_understood(refused: Callable[..., str], words: str) -> None:
    assert refused(*words.split()).endswith("(--help lists all options)")


def test_a_launchers_own_flag_is_passed_over(place: Place) -> None:
    assert place.bench("--local_rank=0", "--attention_type", "mqa", "--max_steps", 1).status == 0


@pytest.mark.parametrize("name", progress.PACKAGES)
def test_a_tracker_that_is_not_installed(
    refused: Callable[..., str], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "find_spec", lambda package: None)
    assert refused("--track", name) == (
        f"benchmark.py: --track {name} needs the package {progress.PACKAGES[name]}; pip "
        f"install 'mka[{name}]'"
    )


# ---- --resume


def test_resume_needs_a_run(place: Place) -> None:
    ended = place.bench("--resume")
    assert ended.complaint == (
        f"benchmark.py: --resume: {place.folder / 'run'} holds no config.json of a run; give "
        "its folder by --output_dir"
    )
    assert list(place.folder.iterdir()) == []
    (place.folder / "run").mkdir()
    assert "holds no config.json of a run" in place.bench("--resume").complaint
    assert list((place.folder / "run").iterdir()) == []
    assert place.bench("--resume", output=None).complaint.startswith(
        "benchmark.py: --resume: runs/tiny-text-"
    )
    assert not (place.folder / "runs").exists()


def test_resume_goes_on_with_one(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ("--attention_type", "mqa", "gqa", "--save_steps", 1)
    with monkeypatch.context() as patch:
        patch.setattr("mka.experiments.benchmark.write_curve", interrupt)
        assert place.bench(*command).status == 130
    ended = place.bench(*command, "--resume")
    assert (ended.status, ended.err) == (0, "")
    assert "Resuming after step 3 of 3\n" in ended.out
    assert place.keys() == [("mqa", 0), ("gqa", 0)]
    again = place.bench(*command, "--resume")
    assert "✅ MQA with seed 0 is already in" in again.out
    assert place.keys() == [("mqa", 0), ("gqa", 0)]


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_strategies_have_names_for_every_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mka.training.deepspeed_config.find_spec", lambda name: object())
    monkeypatch.setenv("RANK", "0")
    for stage in (1, 2, 3):
        path = tmp_path / "ds.json"
        path.write_text(f'{{"zero_optimization": {{"stage": {stage}}}}}')
        config = BenchmarkConfig(deepspeed=True, deepspeed_config=str(path)).resolved()
        assert (
            environment.strategy_name(config, Ranks(), read_deepspeed(config))
            == f"deepspeed zero{stage}"
        )
