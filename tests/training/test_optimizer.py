"""One recipe for every mechanism: warm-up, cosine, and no weight decay on vectors and routers."""

import math

import pytest
import torch

import checks_training as tiny
from checks import TOLERANCE
from mka.attention import ATTENTION_TYPES
from mka.training import train
from mka.training.optimizer import (
    FINAL_FRACTION,
    MAX_GRAD_NORM,
    WEIGHT_DECAY,
    build_optimizer,
    learning_rate_at,
    set_learning_rate,
)


def rates(steps: int, peak: float = 2.0) -> list[float]:
    return [learning_rate_at(step, steps, peak) for step in range(steps + 1)]


@pytest.mark.parametrize("steps", [20, 100, 1000])
def test_warm_up_is_a_line_and_the_rest_a_cosine(steps: int) -> None:
    found, warmup = rates(steps), steps // 10
    assert found[: warmup + 1] == pytest.approx(
        [2.0 * (step + 1) / warmup for step in range(warmup)] + [2.0]
    )
    for step in range(warmup, steps + 1):
        cosine = (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
        assert found[step] == pytest.approx(2.0 * (FINAL_FRACTION + (1 - FINAL_FRACTION) * cosine))
    assert found[steps] == pytest.approx(2.0 * FINAL_FRACTION)
    assert all(a > b for a, b in zip(found[warmup:], found[warmup + 1 :], strict=False))


@pytest.mark.parametrize("steps", [1, 2, 3, 9])
def test_short_runs_never_have_a_zero_or_too_large_a_rate(steps: int) -> None:
    assert all(0 < rate <= 2.0 for rate in rates(steps))


def test_every_step_is_taken_at_the_rate_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[list[float]] = []
    step = torch.optim.AdamW.step

    def spy(optimizer: torch.optim.AdamW, *args: object) -> object:
        taken.append([group["lr"] for group in optimizer.param_groups])
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    train(tiny.tiny_model(), tiny.plan(steps=20, learning_rate=2.0e-3), lambda: 0.0)
    assert taken == [[rate, rate] for rate in rates(20, 2.0e-3)[:-1]]


@pytest.mark.parametrize("kind", ATTENTION_TYPES)
def test_no_weight_decay_on_vectors_and_routers_and_each_parameter_once(kind: str) -> None:
    model = tiny.tiny_model(kind)
    groups = build_optimizer(model, 1e-3).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert (
        sum(len(group["params"]) for group in groups) == len(decay) == len(list(model.parameters()))
    )
    for name, p in model.named_parameters():
        assert decay[id(p)] == (WEIGHT_DECAY if decays(name, p) else 0.0), name


def decays(name: str, p: torch.Tensor) -> bool:
    return p.dim() >= 2 and ".router." not in name


def test_a_rate_of_its_own_and_nothing_that_is_frozen() -> None:
    model = tiny.tiny_model("mka")
    frozen = model.get_parameter("transformer.wte.weight").requires_grad_(False)
    before = tiny.weights_of(model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer = build_optimizer(model, 1.0, lambda name: 3.0 if ".router." in name else 1.0)
    assert all(p is not frozen for group in optimizer.param_groups for p in group["params"])
    set_learning_rate(optimizer, 0.01)
    optimizer.step()
    for name, p in model.named_parameters():
        kept = (
            1 - 0.01 * WEIGHT_DECAY if decays(name, p) else 1.0
        )  # the first step of Adam is the rate itself
        rate = 0.0 if p is frozen else 0.03 if ".router." in name else 0.01
        wanted = before[name] if p is frozen else before[name] * kept - rate
        torch.testing.assert_close(p, wanted, atol=1e-6, rtol=1e-5, msg=name)


def test_without_gradients_matrices_shrink_and_vectors_stay() -> None:
    model = tiny.tiny_model("fmka")
    before = tiny.weights_of(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    build_optimizer(model, 0.1).step()
    for name, p in model.named_parameters():
        wanted = before[name] * (1 - 0.1 * WEIGHT_DECAY) if decays(name, p) else before[name]
        assert torch.equal(p, wanted), name


def test_gradients_are_clipped_before_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, norms = tiny.tiny_model(), []
    step = torch.optim.AdamW.step

    def spy(optimizer: torch.optim.AdamW, *args: object) -> object:
        norms.append(
            torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None])
            .norm()
            .item()
        )
        return step(optimizer, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    torch.nn.init.normal_(model.get_parameter("transformer.wte.weight"))
    train(model, tiny.plan(steps=2), lambda: 0.0)
    assert norms == pytest.approx([MAX_GRAD_NORM] * 2, rel=TOLERANCE[torch.float32])
