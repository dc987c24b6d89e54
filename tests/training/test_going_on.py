"""Interrupted at any step and started again, a training ends with the bytes of one that never
was."""

import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import checks_training as tiny
from mka.training import Checkpoints, Precision, TrainingPlan, TrainingRun
from mka.training.precision import PrecisionName

STEPS = 6
KINDS = ("mha", "mka", "fmka")
PRECISIONS: tuple[PrecisionName, ...] = ("float32", "bfloat16", "float16")


class Restless(Precision):
    """float16's scale overflows at first, and grows every other step: its state is never the
    initial one."""

    def scaler(self) -> torch.amp.GradScaler:
        scaling = {"init_scale": 2.0**60, "backoff_factor": 2.0**-50, "growth_interval": 2}
        return torch.amp.GradScaler("cpu", enabled=self.name == "float16", **scaling)


def plan(precision: PrecisionName, accumulation: int, save_steps: int = 0) -> TrainingPlan:
    chosen = Restless(precision, "cpu")
    return tiny.plan(
        steps=STEPS, precision=chosen, accumulation=accumulation, save_steps=save_steps
    )


@cache
def whole(kind: str, precision: PrecisionName, accumulation: int) -> tiny.Trained:
    return tiny.trained(kind, plan(precision, accumulation))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_training_that_was_interrupted_ends_with_the_same_bytes(
    tmp_path: Path, kind: str, precision: PrecisionName
) -> None:
    """Twice, at steps that were drawn; in accumulated parts."""
    draw, reference = random.Random(f"{kind} {precision}"), whole(kind, precision, 2)
    assert reference.rest["skipped_steps"] == (precision == "float16")
    stops, save_steps = sorted(draw.sample(range(1, STEPS + 1), 2)), draw.choice([1, 2, 3])
    tiny.assert_goes_on_as_if_nothing_had_been(
        tmp_path / "c", kind, plan(precision, 2, save_steps), stops, reference
    )


@pytest.mark.parametrize("stop", range(1, STEPS + 1))
def test_at_every_step(tmp_path: Path, stop: int) -> None:
    reference = whole("mha", "float32", 1)
    tiny.assert_goes_on_as_if_nothing_had_been(
        tmp_path / "c", "mha", plan("float32", 1, 3), [stop], reference
    )


def test_without_checkpoints_on_the_way_it_starts_again(tmp_path: Path) -> None:
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path / "c", {})
    with pytest.raises(tiny.PowerCut):
        tiny.trained("mha", plan("float32", 1), checkpoints, tiny.stopping_after(STEPS - 1))
    assert checkpoints.steps() == []
    ended = tiny.trained("mha", plan("float32", 1), checkpoints, say=said.append)
    assert said == []
    assert ended.rest == whole("mha", "float32", 1).rest


@pytest.mark.parametrize(
    ("save_steps", "saved"), [(0, [6]), (1, [6, 5]), (4, [6, 4]), (5, [6, 5]), (6, [6]), (7, [6])]
)
def test_it_is_saved_at_every_so_many_steps_and_at_the_end(
    tmp_path: Path, save_steps: int, saved: list[int]
) -> None:
    checkpoints = Checkpoints(tmp_path / "c", {})
    tiny.trained("mha", plan("float32", 1, save_steps), checkpoints)
    assert checkpoints.steps() == saved


def test_it_says_where_it_goes_on_and_takes_no_step_twice(tmp_path: Path) -> None:
    taken: list[int] = []
    said: list[str] = []

    def batch_at(step: int) -> Tensor:
        taken.append(step)
        return tiny.batch_at(step)

    watched, checkpoints = (
        tiny.plan(steps=STEPS, save_steps=2, batch_at=batch_at),
        Checkpoints(tmp_path / "c", {}),
    )
    with pytest.raises(tiny.PowerCut):
        tiny.trained("mha", watched, checkpoints, tiny.stopping_after(3), said.append)
    tiny.trained("mha", watched, checkpoints, say=said.append)
    tiny.trained("mha", watched, checkpoints, say=said.append)
    assert taken == [0, 1, 2, 2, 3, 4, 5]
    assert said == [f"Resuming after step {step} of {STEPS}" for step in (2, STEPS)]


def test_a_damaged_checkpoint_costs_only_its_own_steps(tmp_path: Path) -> None:
    interrupted, checkpoints = plan("float32", 1, 2), Checkpoints(tmp_path / "c", {"kind": "mha"})
    with pytest.raises(tiny.PowerCut):
        tiny.trained("mha", interrupted, checkpoints, tiny.stopping_after(5))
    assert checkpoints.steps() == [4, 2]
    tiny.flip_a_bit(checkpoints.folder / "step-00000004" / "model.safetensors")
    tiny.assert_goes_on_as_if_nothing_had_been(
        checkpoints.folder, "mha", interrupted, [], whole("mha", "float32", 1)
    )


@pytest.mark.parametrize("kind", ["mka", "fmka"])
def test_parameters_that_never_had_a_gradient(tmp_path: Path, kind: str) -> None:
    """Where the text is shorter than window and stride, AdamW remembers nothing of the index and of
    the session."""
    options = {"local_window": 128, "chunk_size": 32, "top_k": 4} | (
        {"session_stride": 32} if kind == "mka" else {}
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.OPTIONS, kind, options)
        tiny.assert_goes_on_as_if_nothing_had_been(tmp_path / "c", kind, plan("float32", 1, 1), [3])


@pytest.mark.parametrize("kind", KINDS)
def test_a_training_does_not_depend_on_the_global_random_state(kind: str) -> None:
    """Nor on what draws from it meanwhile: what is not used need not be saved."""

    def disturbed(seed: int) -> tiny.Trained:
        def draw(run: TrainingRun) -> None:
            torch.rand(seed)
            random.random()
            np.random.rand(seed)

        state = torch.get_rng_state(), random.getstate(), np.random.get_state()
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        ended = tiny.trained(kind, plan("float32", 2), on_step=draw)
        torch.set_rng_state(state[0])
        random.setstate(state[1])
        np.random.set_state(state[2])
        return ended

    first, second = disturbed(1), disturbed(2)
    tiny.assert_same_bytes(first.weights, second.weights)
    assert first.rest == second.rest
