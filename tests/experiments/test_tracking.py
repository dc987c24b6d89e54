"""What a tracker is told is what the curves hold."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mka.experiments import progress
from mka.record.results import read_curve
from mka.training import TrainingRun
from tiny_runs import TINY, Place

KINDS = ("mha", "fmka")


def scalars(folder: Path, name: str) -> dict[int, float]:
    events = EventAccumulator(str(folder)).Reload()
    return {event.step: event.value for event in events.Scalars(name)}


def in_float32(value: float | None) -> float:
    """Tensorboard keeps scalars so."""
    assert value is not None
    return float(np.float32(value))


@pytest.fixture(scope="module")
def followed(tiny_place: Place) -> Path:
    """A run of two mechanisms with tensorboard; its folder."""
    words = ("--attention_type", *KINDS, "--max_steps", 7, "--track", "tensorboard")
    ended = tiny_place.bench(*words)
    assert (ended.status, ended.err) == (0, "")
    return tiny_place.folder / "run"


@pytest.mark.parametrize("kind", KINDS)
def test_tensorboard_has_the_curve(followed: Path, kind: str) -> None:
    curve = read_curve(followed, kind, 0)
    folder = followed / "tensorboard" / f"{kind}-seed0"
    assert scalars(folder, "train/loss") == {
        point.step: in_float32(point.train_loss) for point in curve if point.step > 0
    }
    assert scalars(folder, "train/tokens") == {
        step: step * TINY.batch_size * TINY.sequence_length for step in range(1, 8)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_tensorboard_has_every_look(followed: Path, kind: str) -> None:
    curve = read_curve(followed, kind, 0)
    looks = {point.step: point.eval_loss for point in curve if point.eval_loss is not None}
    assert len(looks) == 6
    assert 0 in looks
    assert 7 in looks
    held = scalars(followed / "tensorboard" / f"{kind}-seed0", "eval/loss")
    assert held == {step: in_float32(loss) for step, loss in looks.items()}


def test_there_is_one_folder_for_each_training(followed: Path) -> None:
    assert {path.name for path in (followed / "tensorboard").iterdir()} == {
        f"{kind}-seed0" for kind in KINDS
    }


def test_tracking_changes_no_number(followed: Path, place: Place) -> None:
    assert place.bench("--attention_type", *KINDS, "--max_steps", 7).status == 0
    rows = [json.loads(line) for line in (followed / "results.jsonl").read_text().splitlines()]
    assert [row["eval_loss"] for row in rows] == [row["eval_loss"] for row in place.rows()]
    assert not (place.folder / "run" / "tensorboard").exists()
    assert (
        place.bench("--attention_type", *KINDS, "--max_steps", 7, "--track", "tensorboard").status
        == 0
    )


class Tracker:
    """Remembers what it was told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def start(self) -> None:
        self.told.append("start")

    def store_init_configuration(self, settings: dict[str, Any]) -> None:
        self.told.append(settings)

    def log(self, values: dict[str, Any], step: int) -> None:
        self.told.append((step, values))

    def finish(self) -> None:
        self.told.append("finish")


def test_any_tracker_is_started_told_and_finished_even_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracker()
    monkeypatch.setattr(progress, "make_tracker", lambda *_: tracker)

    def work() -> None:
        with progress.tracked("wandb", tmp_path, "mha-seed0", {"seed": 0}) as on_step:
            on_step(TrainingRun(losses=[3.0, 2.5], tokens=64))
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        work()
    assert tracker.told == [
        "start",
        {"seed": 0},
        (2, {"train/loss": 2.5, "train/tokens": 64}),
        "finish",
    ]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_trackers_are_made_for_the_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[str, str, dict[str, Any]]] = []
    for kind in ("TensorBoardTracker", "WandBTracker", "TrackioTracker"):
        monkeypatch.setattr(
            progress.tracking,
            kind,
            lambda *words, kind=kind, **named: made.append((kind, words[0], named)),
        )
    progress.make_tracker(name, tmp_path, "mha-seed0")
    expected = {
        "tensorboard": (
            "TensorBoardTracker",
            "mha-seed0",
            {"logging_dir": tmp_path / "tensorboard"},
        ),
        "wandb": ("WandBTracker", "mka", {"name": "mha-seed0", "dir": tmp_path}),
        "trackio": ("TrackioTracker", "mka", {"name": "mha-seed0"}),
    }
    assert made == [expected[name]]


def test_no_tracker_needs_no_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(progress, "find_spec", lambda name: None)
    progress.check_tracker("none")
    with progress.tracked("none", tmp_path, "mha-seed0", {}) as on_step:
        on_step(TrainingRun())
    assert list(tmp_path.iterdir()) == []
