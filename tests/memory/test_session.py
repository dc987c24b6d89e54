"""The session average: a true weighted mean, and decays that start spread over the time scales."""

import math
from typing import Literal

import pytest
import torch

from checks import close, make, rows
from checks_state import in_calls
from mka.attention import CausalAttention
from mka.memory.session import LONGEST, SHORTEST, SessionAverage


@pytest.mark.parametrize("decay", [0.9, 0.001, 0.9999, "learned"])
def test_a_constant_input_gives_the_constant_from_the_first_token_on(
    decay: float | Literal["learned"],
) -> None:
    x = torch.full((2, 200, 16), -2.5, dtype=torch.float64)
    close(SessionAverage(16, decay).double()(x), x)


def test_fixed_decay_is_the_formula_of_the_paper() -> None:
    x, m = rows(2, 60), torch.zeros(2, 16, dtype=torch.float64)
    average = SessionAverage(16, 0.9)(x)
    for t in range(60):
        m = 0.9 * m + (1 - 0.9) * x[:, t]
        close(average[:, t], m / (1 - 0.9 ** (t + 1)))


@pytest.mark.parametrize("hidden_size", [2, 3, 64, 768])
def test_learned_time_constants_are_spread_geometrically(hidden_size: int) -> None:
    logit = SessionAverage(hidden_size, "learned").decay_logit.detach().double()
    time_constants = -1 / torch.log(torch.sigmoid(logit))
    ratio = (LONGEST / SHORTEST) ** (1 / (hidden_size - 1))
    expected = SHORTEST * ratio ** torch.arange(hidden_size, dtype=torch.float64)
    close((time_constants / expected).float(), torch.ones(hidden_size))
    assert (SHORTEST, LONGEST) == (4, 4096)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_decay_lies_inside_zero_and_one_whatever_the_weights_are_kept_in(
    dtype: torch.dtype,
) -> None:
    session = SessionAverage(64, "learned").to(dtype)
    decay = session.decay(torch.zeros(1, 64, dtype=dtype))
    assert ((decay > 0) & (decay < 1)).all()
    (grad,) = torch.autograd.grad(decay.log().sum(), session.decay_logit)
    assert (grad > 0).all()


def test_fixed_decay_has_no_parameters_and_learned_one_for_each_channel() -> None:
    assert not list(SessionAverage(16, 0.9).parameters())
    assert [p.shape for p in SessionAverage(16, "learned").parameters()] == [(16,)]


def test_halves_are_averaged_in_float32() -> None:
    x = rows(1, 300, torch.float32).bfloat16()
    average = SessionAverage(16, 0.999)(x)
    assert average.dtype == torch.float32
    close(average, SessionAverage(16, 0.999)(x.float()))


def test_the_half_life_is_what_the_decay_says() -> None:
    """Of two tokens the older one has a times the weight."""
    session = SessionAverage(1, math.exp(-1 / 8))
    x = torch.eye(9, dtype=torch.float64).unsqueeze(-1)
    weights = session(x)[:, -1, 0]
    close(weights[0] / weights[8], torch.tensor(math.exp(-1), dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("logit", [-1e30, -200.0, -90.0, 17.0, 40.0, 200.0, 1e30])
@torch.no_grad()
def test_a_learned_decay_at_its_ends_can_be_carried_on(logit: float, dtype: torch.dtype) -> None:
    """What rounds to 0 or 1 would divide nothing by nothing."""
    attn = make("mka", dtype=dtype, top_k=100)
    attn.get_parameter("session.decay_logit").fill_(logit)
    assert_carried_on(attn, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("decay", [1e-300, 1e-60, 1e-30, 0.9999999, 0.99999999, 1 - 1e-15])
@torch.no_grad()
def test_a_fixed_decay_near_its_ends_can_be_carried_on(decay: float, dtype: torch.dtype) -> None:
    assert_carried_on(make("mka", dtype=dtype, top_k=100, session_decay=decay), dtype)


def assert_carried_on(attn: CausalAttention, dtype: torch.dtype) -> None:
    x = rows(2, 33, dtype)
    valid = torch.arange(33) >= torch.tensor(
        [[0], [20]]
    )  # a row without a token before the second call
    whole = attn(x, valid=valid)[0]
    assert whole.isfinite().all()
    for cuts in ((12,), (5, 6, 30), range(1, 33)):
        close(in_calls(attn, x, cuts, valid)[0], whole)
