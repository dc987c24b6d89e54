"""The router: weights over what exists, exact zeros elsewhere, a gate that shuts exactly, float32
arithmetic."""

import pytest
import torch
from torch import Tensor

from checks import close, rows
from mka.memory.router import LOCAL, LONG_TERM, SESSION, Router

LEVELS = [(True, True, True), (True, True, False), (True, False, True), (True, False, False)]


def router(dtype: torch.dtype = torch.float64) -> Router:
    torch.manual_seed(0)
    made = Router(16, 8).to(dtype)
    torch.nn.init.normal_(made.output.weight)
    return made


def queries(dtype: torch.dtype = torch.float64) -> Tensor:
    return rows(2, 12, dtype).unflatten(-1, (4, 4))


def exists(*levels: bool) -> Tensor:
    return torch.tensor(levels).expand(12, 3)


@pytest.mark.parametrize("levels", LEVELS)
@pytest.mark.parametrize("gate", [1.0, 0.3])
def test_weights_sum_to_one_over_what_exists(levels: tuple[bool, ...], gate: float) -> None:
    made = router()
    made.gate.fill_(gate)
    weights = made.weights(queries(), exists(*levels))
    assert weights.shape == (2, 12, 3)
    close(weights.sum(-1), torch.ones(2, 12, dtype=torch.float64))
    assert (weights[..., torch.tensor(levels)] > 0).all()
    assert (weights[..., ~torch.tensor(levels)] == 0).all()


@pytest.mark.parametrize("levels", LEVELS)
def test_a_missing_level_has_exactly_no_gradient(levels: tuple[bool, ...]) -> None:
    made, direction = router(), torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    (made.weights(queries(), exists(*levels)) * direction).sum().backward()
    assert made.output.bias.grad is not None
    assert made.output.weight.grad is not None
    missing = ~torch.tensor(levels)
    assert (made.output.bias.grad[missing] == 0).all()
    assert (made.output.weight.grad[missing] == 0).all()
    if sum(levels) > 1:
        assert (made.output.bias.grad[~missing] != 0).all()


def test_levels_may_differ_between_tokens_and_rows() -> None:
    made, q = router(), queries()
    there = torch.rand(2, 12, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    there[..., LOCAL] = True
    weights = made.weights(q, there)
    for levels in LEVELS:
        places = (there == torch.tensor(levels)).all(-1)
        assert places.any()
        close(weights[places], made.weights(q, exists(*levels))[places])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_shut_gate_gives_exactly_the_local_level(dtype: torch.dtype) -> None:
    made = router(dtype)
    made.gate.zero_()
    weights = made.weights(queries(dtype), exists(True, True, True))
    assert (weights == torch.tensor([1, 0, 0])).all()


def test_a_shut_gate_can_still_learn_to_open() -> None:
    made = router()
    made.gate = torch.zeros((), dtype=torch.float64, requires_grad=True)
    made.weights(queries(), exists(True, True, True))[..., LOCAL].sum().backward()
    assert made.gate.grad is not None
    assert made.gate.grad < 0


def test_an_open_gate_gives_exactly_the_softmax() -> None:
    made, q = router(), queries()
    logits = made.output(torch.nn.functional.silu(made.hidden(q.flatten(2))))
    close(made.weights(q, exists(True, True, True)), logits.softmax(-1))


def test_training_starts_from_a_known_mix_for_every_token() -> None:
    weights = Router(16, 8).weights(queries(torch.float32), exists(True, True, True))
    e = torch.tensor(3.0).exp()
    expected = torch.stack([e, torch.tensor(1.0), torch.tensor(1.0)]) / (e + 2)
    assert expected[0] > 0.9
    close(weights, expected.expand(2, 12, 3))
    assert (LOCAL, SESSION, LONG_TERM) == (0, 1, 2)


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_arithmetic_is_float32_under_autocast_and_with_half_weights(
    weights_dtype: torch.dtype,
) -> None:
    made, q = router(weights_dtype), queries(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = made.weights(q, exists(True, True, False))
    assert weights.dtype == torch.float32
    exact = made.float().weights(q.float(), exists(True, True, False))
    assert torch.equal(weights, exact)


def joint(dtype: torch.dtype = torch.float64) -> Router:
    torch.manual_seed(0)
    made = Router(16, 8, num_heads=4).to(dtype)
    torch.nn.init.normal_(made.output.weight)
    torch.nn.init.normal_(made.output.bias)
    return made


def test_biases_are_by_head_and_against_the_local_level() -> None:
    made, q = joint(), queries()
    logits = made.output(torch.nn.functional.silu(made.hidden(q.flatten(2)))).view(2, 12, 4, 3)
    biases = made.biases(q)
    close(biases, logits - logits[..., :1])
    assert (biases[..., LOCAL] == 0).all()
    assert biases.std(2)[..., SESSION].min() > 0


def test_joint_training_starts_without_biases() -> None:
    assert (Router(16, 8, num_heads=4).biases(queries(torch.float32)) == 0).all()


def test_after_a_conversion_biases_are_0_and_the_session_is_shut() -> None:
    made = Router(16, 8, num_heads=4)
    made.learn_gate()
    made.reset_output()
    assert (made.biases(queries(torch.float32)) == 0).all()
    factor = made.session_factor()
    assert factor is not None
    assert factor.item() == 0
    assert Router(16, 8, num_heads=4).session_factor() is None


@pytest.mark.parametrize(("gate", "factor"), [(0.0, 0.0), (0.3, 0.3), (-0.2, 0.0)])
def test_a_gate_below_0_is_shut_and_can_come_back(gate: float, factor: float) -> None:
    made = Router(16, 8, num_heads=4)
    made.learn_gate()
    torch.nn.init.constant_(made.gate, gate)
    shown = made.session_factor()
    assert shown is not None
    assert shown.item() == pytest.approx(factor)
    (slope,) = torch.autograd.grad(shown, made.gate)
    assert slope.item() == 1


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_biases_are_float32_under_autocast_and_with_half_weights(
    weights_dtype: torch.dtype,
) -> None:
    made, q = joint(weights_dtype), queries(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        biases = made.biases(q)
    assert biases.dtype == torch.float32
    assert torch.equal(biases, made.float().biases(q.float()))
