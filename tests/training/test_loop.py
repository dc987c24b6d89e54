"""The loop: the same bytes every time, accumulation, looks, what is counted, and where it stops."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import checks_training as tiny
from checks import TOLERANCE
from mka.attention import ATTENTION_TYPES
from mka.training import NonFiniteLoss, TrainingRun, loop, train


def no_look() -> float:
    return 0.0


@pytest.mark.parametrize("kind", ATTENTION_TYPES)
def test_the_same_seed_gives_the_same_bytes(kind: str) -> None:
    models = [tiny.tiny_model(kind, seed=1, **tiny.OPTIONS.get(kind, {})) for _ in range(2)]
    runs = [train(model, tiny.plan(steps=4), no_look) for model in models]
    assert runs[0].losses == runs[1].losses
    tiny.assert_same_bytes(*(tiny.weights_of(model) for model in models))
    untrained = tiny.weights_of(tiny.tiny_model(kind, seed=1, **tiny.OPTIONS.get(kind, {})))
    assert all(
        (p != untrained[name]).any()
        for name, p in tiny.weights_of(models[0]).items()
        if p.dim() == 2
    )


def test_the_loss_falls() -> None:
    run = train(tiny.tiny_model(), tiny.plan(steps=60), no_look)
    assert run.final_loss < run.losses[0] - 1
    assert run.final_loss == pytest.approx(sum(run.losses[-6:]) / 6)
    assert run.tokens == 60 * 8 * tiny.LENGTH


@pytest.mark.parametrize("kind", ["mha", "fmka"])
def test_four_accumulated_parts_equal_one_batch(kind: str) -> None:
    runs = [
        train(tiny.tiny_model(kind), tiny.plan(accumulation=parts), no_look) for parts in (1, 4)
    ]
    for whole, accumulated in zip(*(run.losses for run in runs), strict=True):
        assert abs(whole / accumulated - 1) <= TOLERANCE[torch.float32]


def test_each_part_is_a_quarter_of_the_rows() -> None:
    model, shapes = tiny.tiny_model(), []
    model.register_forward_pre_hook(lambda module, args: shapes.append(args[0].shape))
    train(model, tiny.plan(steps=1, accumulation=4), no_look)
    assert shapes == [(2, tiny.LENGTH)] * 4


@pytest.mark.parametrize("steps", [1, 2, 5, 12, 20])
def test_looks_at_the_start_and_at_the_end(steps: int) -> None:
    model, modes = tiny.tiny_model(), []
    model.register_forward_pre_hook(lambda module, args: modes.append(module.training))

    def look() -> float:
        model.eval()
        return 1.5

    run = train(model, tiny.plan(steps=steps), look)
    looked = [point.step for point in run.curve if point.eval_loss is not None]
    assert looked[0] == 0
    assert looked[-1] == steps
    assert len(looked) == min(loop.LOOKS, steps + 1)
    assert [point.step for point in run.curve] == list(range(steps + 1))
    assert [point.train_loss for point in run.curve] == [None, *run.losses]
    # A look leaves the model in evaluation mode; the next step must train again.
    assert all(modes)


def test_a_long_curve_is_thinned_to_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "LOGGED_POINTS", 3)
    run = train(tiny.tiny_model(), tiny.plan(steps=9), no_look)
    point = next(point for point in run.curve if point.step == 6)
    assert point.train_loss == pytest.approx(sum(run.losses[3:6]) / 3)


def test_time_spent_on_looks_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def perf_counter() -> float:
        now[0] += 1
        return now[0]

    def look() -> float:
        now[0] += 1000
        return 0.0

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=perf_counter))
    run = train(tiny.tiny_model(), tiny.plan(steps=7), look)
    assert run.seconds == 7
    assert [point.seconds for point in run.curve] == [0, 1, 2, 3, 4, 5, 6, 7]


class FailsAt(nn.Module):
    """A model whose logits are not finite from the n-th forward pass on."""

    def __init__(self, passes: int, value: float) -> None:
        super().__init__()
        self.model, self.passes, self.value = tiny.tiny_model(), passes, value

    def forward(self, tokens: Tensor, use_cache: bool = False) -> Any:
        self.passes -= 1
        logits = self.model(tokens).logits
        return SimpleNamespace(logits=logits if self.passes > 0 else logits * self.value)


CAUSE = "all layer outputs are finite; only the loss is not"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("passes", "accumulation", "step"), [(1, 1, 1), (3, 1, 3), (4, 2, 2), (8, 4, 2)]
)
def test_a_non_finite_loss_stops_before_the_step(
    value: float, passes: int, accumulation: int, step: int
) -> None:
    model, before = FailsAt(passes, value), {}

    def batch_at(number: int) -> Tensor:
        before.update(tiny.weights_of(model))
        return tiny.batch_at(number)

    taken: list[int] = []

    def on_step(run: TrainingRun) -> None:
        taken.append(len(run.losses))

    with pytest.raises(
        NonFiniteLoss, match=rf"^the loss at step {step} is nan; {CAUSE}; try [^\n]+$"
    ):
        train(model, tiny.plan(batch_at=batch_at, accumulation=accumulation), no_look, on_step)
    tiny.assert_same_bytes(tiny.weights_of(model), before)
    assert taken == list(range(1, step))


def test_a_held_out_loss_that_is_not_finite_stops_too() -> None:
    """Weights that the last step spoilt never become a result."""
    looks = iter([1.0, float("nan")])
    with pytest.raises(
        NonFiniteLoss, match=r"^the held-out loss after step \d+ is nan; try [^\n]+$"
    ):
        train(tiny.tiny_model(), tiny.plan(steps=5), lambda: next(looks))
