"""The contract on both sides of every switch: a length, a tile or a store at which the code takes
another path.

The sizes are patched small, so that short rows cross them many times; the slow twin knows none of
them.
"""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import checks
import checks_state
import switches
from checks_memory_state import state_of
from mka.attention import ATTENTION_TYPES

TOKENS = 61
LENGTHS = (61, 20, 7)
SEARCHED = ("mka", "fmka")
"""Mechanisms with memories: they meet every switch."""
PLAIN = (
    "windowed blocks of two",
    "a mask for three queries",
    "a mask of few elements",
    "stores that grow by one",
)
"""Switches that the others meet too."""
CASES = [
    (kind, name)
    for name in switches.SWITCHES
    for kind in ATTENTION_TYPES
    if kind in SEARCHED or name in PLAIN or name == "all of them small"
]
every_switch = pytest.mark.parametrize(("kind", "name"), CASES)
every_store = pytest.mark.parametrize("store", ["device", "host", "disk"])


def make(kind: str) -> Any:
    return checks.make(kind, "far" if kind in SEARCHED else "small")


def padded() -> tuple[Tensor, Tensor]:
    """Three rows of 61, 20 and 7 tokens, padded on the left, and which of them are tokens."""
    t = torch.arange(TOKENS)
    return checks.rows(3, TOKENS), t >= TOKENS - torch.tensor(LENGTHS)[:, None]


@cache
def by_hand(kind: str) -> tuple[Tensor, tuple[Tensor, ...]]:
    """The naive twin's outputs and gradients: no switch changes them."""
    return outputs_and_gradients(make(kind), checks.naive)


@torch.enable_grad()
def outputs_and_gradients(attn: Any, compute: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    x, valid = padded()
    x.requires_grad_()
    y = compute(attn, x, valid=valid)
    direction = checks.rows(3, TOKENS, seed=5)
    wanted = [x, *attn.parameters()]
    return y.detach(), torch.autograd.grad(
        y, wanted, direction, allow_unused=True, materialize_grads=True
    )


@every_switch
def test_equals_the_naive_twin(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    y, gradients = by_hand(kind)
    switches.switch(monkeypatch, switches.SWITCHES[name])
    fast, fast_gradients = outputs_and_gradients(
        make(kind), lambda attn, x, valid: attn(x, valid=valid)[0]
    )
    checks.close(fast, y)
    for ours, wanted in zip(fast_gradients, gradients, strict=True):
        checks.close(ours, wanted)


@every_switch
@torch.no_grad()
def test_calls_with_a_state_equal_the_naive_twin(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    y, _ = by_hand(kind)
    switches.switch(monkeypatch, switches.SWITCHES[name])
    attn, (x, valid) = make(kind), padded()
    for number, cuts in enumerate([(), (1, 40), (9, 10, 30, 58), range(1, TOKENS)]):
        checks.close(checks_state.in_calls(attn, x, cuts, valid, reversible=5 * (number % 2))[0], y)


@every_switch
def test_the_future_changes_nothing(kind: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    switches.switch(monkeypatch, switches.SWITCHES[name])
    attn, x = make(kind), checks.rows(1, TOKENS)
    with torch.no_grad():
        y = attn(x)[0]
        for t in (0, 8, 21, 40, 59):
            changed = x.clone()
            changed[:, t + 1 :] = 1e6 * checks.rows(1, TOKENS, seed=t + 1)[:, t + 1 :]
            for outputs in (attn(changed)[0], attn(changed, state=attn.initial_state(1))[0]):
                checks.close(outputs[:, : t + 1], y[:, : t + 1])


@every_switch
@torch.no_grad()
def test_tokens_taken_back_and_rows_chosen(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    switches.switch(monkeypatch, switches.SWITCHES[name])
    attn, (x, valid) = make(kind), padded()
    checks_state.assert_crop_forgets(attn, x, 47, reversible=9)
    checks_state.assert_rows_can_be_chosen(attn, x, [2, 0, 0, 1], valid)


@pytest.mark.parametrize("kind", SEARCHED)
@pytest.mark.parametrize(
    "name", [*switches.STORED, "all of them small", "always gathered", "neighbors always together"]
)
@every_store
@torch.no_grad()
def test_every_store(kind: str, name: str, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One call and many agree with the naive twin."""
    switches.switch(monkeypatch, switches.ALL[name])
    attn, (x, valid) = make(kind), padded()
    whole = checks_state.in_calls(attn, x, (), valid, state=state_of(attn, 3, store))[0]
    checks.close(whole, by_hand(kind)[0])
    for cuts in ((1, 40), range(1, TOKENS)):
        state = state_of(attn, 3, store)
        checks.close(checks_state.in_calls(attn, x, cuts, valid, state=state)[0], whole)


def test_every_number_in_the_code_is_a_switch_or_is_none() -> None:
    """A constant that is added is a size at which paths part, until somebody says that it is
    not."""
    found = set(switches.numbers_in_the_code())
    assert found == switches.patched_names() | switches.NO_SWITCHES
