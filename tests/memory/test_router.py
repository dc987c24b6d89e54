"""The router: weights over what exists, exact zeros elsewhere, a gate that shuts exactly, float32 arithmetic."""

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
    weights = made(queries(), exists(*levels))
    assert weights.shape == (2, 12, 3)
    close(weights.sum(-1), torch.ones(2, 12, dtype=torch.float64))
    assert (weights[..., torch.tensor(levels)] > 0).all()
    assert (weights[..., ~torch.tensor(levels)] == 0).all()


@pytest.mark.parametrize("levels", LEVELS)
def test_a_missing_level_has_exactly_no_gradient(levels: tuple[bool, ...]) -> None:
    made, direction = router(), torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    (made(queries(), exists(*levels)) * direction).sum().backward()
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
    weights = made(q, there)
    for levels in LEVELS:
        places = (there == torch.tensor(levels)).all(-1)
        assert places.any()
        close(weights[places], made(q, exists(*levels))[places])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_shut_gate_gives_exactly_the_local_level(dtype: torch.dtype) -> None:
    made = router(dtype)
    made.gate.zero_()
    weights = made(queries(dtype), exists(True, True, True))
    assert (weights == torch.tensor([1, 0, 0])).all()


def test_a_shut_gate_can_still_learn_to_open() -> None:
    made = router()
    made.gate = torch.zeros((), dtype=torch.float64, requires_grad=True)
    made(queries(), exists(True, True, True))[..., LOCAL].sum().backward()
    assert made.gate.grad is not None
    assert made.gate.grad < 0


def test_an_open_gate_gives_exactly_the_softmax() -> None:
    made, q = router(), queries()
    logits = made.output(torch.nn.functional.silu(made.hidden(q.flatten(2))))
    close(made(q, exists(True, True, True)), logits.softmax(-1))


def test_training_starts_from_a_known_mix_for_every_token() -> None:
    weights = Router(16, 8)(queries(torch.float32), exists(True, True, True))
    e = torch.tensor(1.0).exp()
    expected = torch.stack([e, torch.tensor(1.0), torch.tensor(1.0)]) / (e + 2)
    close(weights, expected.expand(2, 12, 3))
    assert (LOCAL, SESSION, LONG_TERM) == (0, 1, 2)


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_arithmetic_is_float32_under_autocast_and_with_half_weights(weights_dtype: torch.dtype) -> None:
    made, q = router(weights_dtype), queries(torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights = made(q, exists(True, True, False))
    assert weights.dtype == torch.float32
    exact = made.float()(q.float(), exists(True, True, False))
    assert torch.equal(weights, exact)
