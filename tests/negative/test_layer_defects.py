"""Layers that are read, and blocks that go apart, planted: their tests turn red."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import checks
import checks_wrapped
from contract import test_state
from memory import test_session
from mka.attention.base import CausalAttention
from mka.memory.session import SessionAverage
from mka.memory.state import State
from mka.models.cache import StateLayer
from models import test_all_blocks

Plant = Callable[[pytest.MonkeyPatch], None]


def weights_of_wrapped_layers_are_read(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("mka.attention.mla.is_plain", lambda layer: True)
    patch.setattr(
        checks_wrapped.Wrapped,
        "weight",
        property(lambda wrapped: wrapped.inside.weight),
        raising=False,
    )
    patch.setattr(
        checks_wrapped.Wrapped, "bias", property(lambda wrapped: wrapped.inside.bias), raising=False
    )


def the_router_reads_its_layers(patch: pytest.MonkeyPatch) -> None:
    """Its own matrix products with the weights that it finds."""

    def call(wrapped: Any, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, wrapped.inside.weight, wrapped.inside.bias)

    patch.setattr(checks_wrapped.Wrapped, "forward", call)


@pytest.mark.parametrize(
    ("plant", "kind", "name"),
    [
        (weights_of_wrapped_layers_are_read, "mla", "k_up_proj"),
        (weights_of_wrapped_layers_are_read, "mla", "v_up_proj"),
        (the_router_reads_its_layers, "mka", "router.hidden"),
        (the_router_reads_its_layers, "fmka", "router.output"),
    ],
)
def test_a_layer_that_is_read(
    plant: Plant, kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def check() -> None:
        checks_wrapped.assert_layer_is_called(
            checks.make(kind, "biased"), name, checks.make(kind, "biased")
        )

    check()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()


@torch.no_grad()
def test_a_state_made_after_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the dtype of the first parameter, as it once was: with eight-bit weights every key is a
    whole number."""

    def check() -> None:
        attn, x = checks.make("gqa", dtype=torch.float32), checks.rows(1, 20, torch.float32)
        checks_wrapped.quantize(attn)
        state, parts = attn.initial_state(1), []
        for part in (x[:, :9], x[:, 9:]):
            y, state = attn(part, state=state)
            parts.append(y)
        checks.close(torch.cat(parts, 1), attn(x)[0])

    check()
    monkeypatch.setattr(
        CausalAttention, "own_dtype", property(lambda attn: next(attn.parameters()).dtype)
    )
    with pytest.raises(AssertionError):
        check()


def test_room_in_one_block_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        test_all_blocks.test_a_budget_that_ends_in_the_middle_of_a_call("mka", "host", 1)

    check()
    monkeypatch.setattr(StateLayer, "reserve", lambda layer, x, counts: None)
    with pytest.raises(AssertionError):
        check()


def test_a_torn_cache_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        test_all_blocks.test_a_torn_cache_is_refused("gqa", 12)

    check()
    monkeypatch.setattr("mka.models.adapter.begin_call", lambda *_: None)
    with pytest.raises(pytest.fail.Exception):
        check()


def test_a_torn_state_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        test_state.test_a_state_whose_call_ended_in_an_error_is_refused("gqa", "small")

    check()
    monkeypatch.setattr(
        State, "in_call", property(lambda _: False, lambda _, value: None), raising=False
    )
    with pytest.raises(pytest.fail.Exception):
        check()


def test_a_mask_of_the_past_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        test_all_blocks.test_a_mask_that_takes_back_what_was_read("mka")

    check()
    monkeypatch.setattr(StateLayer, "check_past", lambda layer, past: None)
    with pytest.raises(pytest.fail.Exception):
        check()


def test_a_decay_that_rounds_to_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        test_session.test_a_learned_decay_at_its_ends_can_be_carried_on(40.0, torch.float32)

    check()
    monkeypatch.setattr(
        SessionAverage, "decay", lambda session, x: torch.sigmoid(session.decay_logit)
    )
    with pytest.raises(AssertionError):
        check()
