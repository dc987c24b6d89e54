"""Gradients that overflow in float16, and activations that are computed twice."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import checks_training as tiny
from checks import TOLERANCE
from mka.distributed import Ranks
from mka.models import checkpoint_blocks
from mka.training import Checkpoints, NonFiniteLoss, Precision, TrainingRun, train
from mka.training.engine import TorchEngine
from mka.training.precision import PrecisionName

FLOAT16 = Precision("float16", "cpu")


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["transformer.wte.weight", "transformer.h.1.mlp.c_fc.bias"])
def test_one_gradient_that_overflows_skips_the_step(
    monkeypatch: pytest.MonkeyPatch, name: str, accumulation: int, value: float
) -> None:
    model, seen = tiny.tiny_model(), []
    gradients, step = TorchEngine.gradients, TorchEngine.step

    def planting(engine: TorchEngine, parts: tuple[Tensor, ...]) -> list[Tensor]:
        losses, gradient = gradients(engine, parts), model.get_parameter(name).grad
        assert gradient is not None
        if len(seen) == 2:
            gradient.view(-1)[1] = value
        return losses

    def stepping(engine: TorchEngine, learning_rate: float) -> bool:
        weights, moments, rest = engine.state()
        before = {key: tensor.clone() for key, tensor in (weights | moments).items()}
        skipped = step(engine, learning_rate)
        weights, moments, after = engine.state()
        same = all(
            torch.equal(before[key], tensor)
            for key, tensor in (weights | moments).items()
            if key in before
        )
        seen.append((skipped, same, after["scaler"]["scale"] / rest["scaler"]["scale"]))
        return skipped

    monkeypatch.setattr(TorchEngine, "gradients", planting)
    monkeypatch.setattr(TorchEngine, "step", stepping)
    run = train(
        model, tiny.plan(steps=4, precision=FLOAT16, accumulation=accumulation), lambda: 0.0
    )
    good, skipped = (False, False, 1.0), (True, True, 0.5)
    assert seen == [good, good, skipped, good]
    assert run.skipped_steps == 1
    assert run.tokens == 4 * 8 * tiny.LENGTH


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_stops_before_the_step(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, value: float, precision: PrecisionName
) -> None:
    """The loss is finite; clipping would make every weight NaN, and --save_steps 1 would keep
    them."""
    model, gradients, losses = tiny.tiny_model(), TorchEngine.gradients, []

    def planting(engine: TorchEngine, parts: tuple[Tensor, ...]) -> list[Tensor]:
        losses.append(gradients(engine, parts))
        gradient = model.get_parameter("transformer.ln_f.weight").grad
        assert gradient is not None
        if len(losses) == 3:
            gradient[0] = value
        return losses[-1]

    checkpoints = Checkpoints(tmp_path, {})
    plan = tiny.plan(steps=6, save_steps=1, precision=Precision(precision, "cpu"))
    with monkeypatch.context() as patch:
        patch.setattr(TorchEngine, "gradients", planting)
        with pytest.raises(
            NonFiniteLoss, match=r"^at step 3 a gradient is not finite, the loss is [\d.]+; try "
        ):
            train(model, plan, lambda: 0.0, checkpoints=checkpoints)
    saved = checkpoints.newest(print)
    assert saved is not None
    assert saved.step == 2
    assert all(
        torch.equal(saved.weights[name], values) for name, values in tiny.weights_of(model).items()
    )
    again = tiny.tiny_model()
    train(again, plan, lambda: 0.0, checkpoints=checkpoints)
    whole = tiny.tiny_model()
    train(whole, plan, lambda: 0.0)
    tiny.assert_same_bytes(tiny.weights_of(again), tiny.weights_of(whole))


@pytest.mark.parametrize("kind", ["mha", "fmka"])
def test_a_scale_that_is_far_too_large_comes_down_by_itself(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 2**40 it is halved until the gradients fit; a step is counted as skipped where no weight
    moved."""
    model, skipped, still = tiny.tiny_model(kind), [0], []
    before = tiny.weights_of(model)

    class Far(Precision):
        def scaler(self) -> torch.amp.GradScaler:
            return torch.amp.GradScaler("cpu", init_scale=2.0**40)

    def on_step(run: TrainingRun) -> None:
        now = tiny.weights_of(model)
        still.append(all(torch.equal(before[name], values) for name, values in now.items()))
        skipped.append(run.skipped_steps)
        before.update(now)

    run = train(model, tiny.plan(steps=40, precision=Far("float16", "cpu")), lambda: 0.0, on_step)
    assert still[:10] == [True] * 10
    assert not still[-1]
    assert [after - before for before, after in pairwise(skipped)] == still
    assert run.losses[-1] < run.losses[0]


def noting(passes: list[bool]) -> Callable[[nn.Module, object], None]:
    return lambda module, args: passes.append(module.training)


@pytest.mark.parametrize("kind", ["mha", "mka", "fmka"])
def test_gradient_checkpointing_gives_the_same_losses(kind: str) -> None:
    """It is at work: each block runs twice in a step, for the second time during the backward
    pass."""
    runs: list[TrainingRun] = []
    passes: list[list[bool]] = [[], []]
    for twice, shown in enumerate(passes):
        model = tiny.tiny_model(kind, **tiny.OPTIONS.get(kind, {}))
        if twice:
            checkpoint_blocks(model)
        block = model.get_submodule("transformer.h.1.attn")
        block.register_forward_pre_hook(noting(shown))
        runs.append(train(model, tiny.plan(accumulation=2), lambda: 0.0))
    assert [len(shown) for shown in passes] == [12, 24]
    for kept, again in zip(runs[0].losses, runs[1].losses, strict=True):
        assert abs(again / kept - 1) <= TOLERANCE[torch.float32]


def test_an_engine_that_never_stepped_has_a_state() -> None:
    weights, moments, rest = TorchEngine(tiny.tiny_model(), 1e-3, FLOAT16, Ranks()).state()
    tiny.assert_same_bytes(weights, tiny.weights_of(tiny.tiny_model()))
    assert moments == {}
    assert rest["scaler"]["scale"] == 2.0**16
