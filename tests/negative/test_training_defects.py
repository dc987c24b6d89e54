"""Planted in training: what a checkpoint may lose, what several ranks may miscount. Each check has
to turn red."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import checks_training as tiny
from checks_ranks import assert_first_step_is_that_of_one_rank, assert_ranks_score_every_token_once
from mka import storage
from mka.distributed import Ranks
from mka.evaluation import HeldOutLoss, held_out_loss
from mka.training import Checkpoint, Checkpoints, TrainingPlan, loop
from mka.training.engine import TorchEngine

PLAN = tiny.plan(save_steps=1)

# ---- going on


def goes_on(folder: Path) -> None:
    tiny.assert_goes_on_as_if_nothing_had_been(folder / "c", "fmka", PLAN, [3])


def test_a_checkpoint_that_forgets_the_moments_turns_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Checkpoints.save

    def forgetful(checkpoints: Checkpoints, checkpoint: Checkpoint) -> None:
        zeros = {name: torch.zeros_like(values) for name, values in checkpoint.optimizer.items()}
        save(checkpoints, replace(checkpoint, optimizer=zeros))

    goes_on(tmp_path / "as it is")
    monkeypatch.setattr(Checkpoints, "save", forgetful)
    with pytest.raises(AssertionError):
        goes_on(tmp_path / "planted")


@pytest.mark.parametrize("moment", ["step", "exp_avg", "exp_avg_sq"])
def test_a_moment_that_is_not_taken_up_turns_red(
    tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = TorchEngine.load

    def partly(engine: TorchEngine, optimizer: dict[str, Tensor], rest: dict[str, Any]) -> None:
        lost = {
            name: torch.zeros_like(values)
            for name, values in optimizer.items()
            if name.endswith(f".{moment}")
        }
        assert lost
        load(engine, optimizer | lost, rest)

    monkeypatch.setattr(TorchEngine, "load", partly)
    with pytest.raises(AssertionError):
        goes_on(tmp_path)


def test_a_checkpoint_of_half_precision_turns_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = Checkpoints.save

    def rounded(checkpoints: Checkpoints, checkpoint: Checkpoint) -> None:
        weights = {name: values.bfloat16().float() for name, values in checkpoint.weights.items()}
        save(checkpoints, replace(checkpoint, weights=weights))

    monkeypatch.setattr(Checkpoints, "save", rounded)
    with pytest.raises(AssertionError):
        goes_on(tmp_path)


def test_a_rate_that_starts_again_turns_red(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A schedule that counts the steps of this process instead of those of the training."""
    real, calls = loop.learning_rate_at, [0]
    whole = tiny.trained("mha", PLAN)

    def counted(step: int, steps: int, peak: float) -> float:
        calls[0] += 1
        return real((calls[0] - 1) % 3, steps, peak)

    monkeypatch.setattr(loop, "learning_rate_at", counted)
    with pytest.raises(AssertionError):
        tiny.assert_goes_on_as_if_nothing_had_been(tmp_path, "mha", PLAN, [3], whole)


# ---- damage


def manifest_first(temporary: Path, fill: Callable[[Path], Mapping[str, Any]]) -> None:
    """The folder counts as whole before anything is in it, and nobody looks at what comes later."""
    temporary.mkdir()
    details = {"step": int(temporary.name[6:14]), "identity": {"seed": 0}}
    manifest = storage.manifest_text({"details": details, "files": {}})
    (temporary / storage.MANIFEST).write_text(manifest, encoding="utf-8")
    fill(temporary)


def sizes_only(path: Path) -> str:
    return str(path.stat().st_size)


@pytest.mark.parametrize("damage", ["cut", "flipped", "removed"])
def test_a_manifest_that_is_written_first_turns_red(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "build", manifest_first)
    with pytest.raises((AssertionError, OSError, json.JSONDecodeError)):
        tiny.assert_damage_is_noticed(tmp_path, "progress.json", damage)


@pytest.mark.parametrize("name", tiny.CHECKPOINT_FILES[:3])
def test_a_check_of_sizes_alone_turns_red(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "sha256_of", sizes_only)
    with pytest.raises((AssertionError, ValueError)):
        tiny.assert_damage_is_noticed(tmp_path, name, "flipped")


# ---- several ranks


@pytest.mark.parametrize(("count", "accumulation"), [(1, 1), (2, 1), (3, 2), (4, 3)])
def test_as_it_is_a_step_on_several_ranks_is_that_of_one(count: int, accumulation: int) -> None:
    assert_first_step_is_that_of_one_rank(count, accumulation)


@dataclass(frozen=True)
class SumsForMeans(Ranks):
    """Ranks on which what the loop divides by is one too few."""

    def sum(self, values: Iterable[float]) -> list[float]:
        return [value * self.count for value in super().sum(values)]


@dataclass(frozen=True)
class KeepsItsOwn(Ranks):
    """Ranks that never hear of the others' loss."""

    def sum(self, values: Iterable[float]) -> list[float]:
        return [value * self.count for value in values]


@dataclass(frozen=True)
class AllTheFirst(Ranks):
    """Ranks that all take the first one's rows."""

    @property
    def rank(self) -> int:
        return 0


@pytest.mark.parametrize("defect", [SumsForMeans, KeepsItsOwn, AllTheFirst])
def test_a_loss_that_is_not_the_mean_over_the_ranks_turns_red(defect: type[Ranks]) -> None:
    def planted(ranks: Ranks) -> TrainingPlan:
        options = {"batch_at": lambda s: tiny.batch_at(s, 12)}
        return tiny.plan(steps=1, ranks=defect(ranks.accelerator), **options)

    with pytest.raises(AssertionError, match=r"the loss is off by|the ranks disagree on the loss"):
        assert_first_step_is_that_of_one_rank(2, plan_of=planted)


def padded(
    model: Any, batches: Iterable[Any], device: Any, autocast: Any, ranks: Ranks
) -> HeldOutLoss:
    """Each rank's turn is filled up with the last batch, and that is counted."""
    filled = list(batches)
    while len(filled) % ranks.count:
        filled.append(filled[-1])
    return held_out_loss(model, filled, device, autocast, ranks)


def dropped(
    model: Any, batches: Iterable[Any], device: Any, autocast: Any, ranks: Ranks
) -> HeldOutLoss:
    """What does not fill a turn of all ranks is left out."""
    kept = list(batches)
    return held_out_loss(
        model, kept[: len(kept) - len(kept) % ranks.count], device, autocast, ranks
    )


@pytest.mark.parametrize("score", [padded, dropped])
def test_an_evaluation_that_counts_a_batch_twice_or_not_turns_red(
    score: Callable[..., HeldOutLoss],
) -> None:
    assert_ranks_score_every_token_once(held_out_loss, 2, 2)
    with pytest.raises(AssertionError, match="a token is counted twice or not at all"):
        assert_ranks_score_every_token_once(score, 2, 2)
