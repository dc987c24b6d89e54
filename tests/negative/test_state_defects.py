"""What the published implementations do wrong when they decode, planted: the tests of the state
turn red."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import checks
import checks_state
from mka.memory.entry import Entry
from mka.memory.state import State

Plant = Callable[[pytest.MonkeyPatch], None]
MEMORY = ("mka", "fmka")


def average_that_restarts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("mka.memory.session.carry_average", lambda mean, *_: mean)


def count_of_tokens_shared_over_rows(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        State, "starts", lambda state, device: torch.tensor(state.past[:1], device=device)
    )


def zeros_for(*names: str) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        real = State.latest

        def latest(state: State, name: str, count: int, *, after: bool) -> Tensor:
            return real(state, name, count, after=after) * (name not in names)

        patch.setattr(State, "latest", latest)

    return plant


def crop_that_forgets(name: str) -> Plant:
    def plant(patch: pytest.MonkeyPatch) -> None:
        real = State.crop

        def crop(state: State, num_tokens: int) -> State:
            state.tensors[name].zero_()
            return real(state, num_tokens)

        patch.setattr(State, "crop", crop)

    return plant


def crop_that_only_counts(patch: pytest.MonkeyPatch) -> None:
    """The ring keeps nothing to take back."""
    patch.setattr(Entry, "limit", lambda entry, reversible: entry.latest)


def ring_too_small(patch: pytest.MonkeyPatch) -> None:
    """One place less would do: the token of the call itself can be read before it is written."""
    patch.setattr(
        Entry,
        "limit",
        lambda entry, reversible: entry.latest and max(1, entry.latest + reversible - 2),
    )


def a_sink_that_is_forgotten_by_crop(patch: pytest.MonkeyPatch) -> None:
    real = State.crop

    def crop(state: State, num_tokens: int) -> State:
        for name, entry in state.entries.items():
            if entry.first:
                state.tensors[name][:, : entry.first] = 0
        return real(state, num_tokens)

    patch.setattr(State, "crop", crop)


def no_place_for_sinks(patch: pytest.MonkeyPatch) -> None:
    """They stand in the ring, and are written over."""
    patch.setattr(
        Entry, "place", lambda entry, number, limit: number if limit is None else number % limit
    )
    patch.setattr(
        Entry,
        "number_at",
        lambda entry, place, count, limit: count - 1 - (count - 1 - place) % limit,
    )


def rows_left_in_place(patch: pytest.MonkeyPatch) -> None:
    def select(state: State, rows: list[int]) -> State:
        state.past, state.lengths, state.furthest = (
            [counts[row] for row in rows] for counts in (state.past, state.lengths, state.furthest)
        )
        return state

    patch.setattr(State, "select", select)


def one_session_slot_late(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        "mka.attention.mka.slot_columns", lambda stride, tokens, state: _late(stride, tokens, state)
    )


def _late(stride: int, tokens: int, state: State) -> Tensor:
    from mka.memory.session import slot_columns

    return (slot_columns(stride, tokens, state) + 1).clamp(max=tokens - 1)


def split(attn: Any) -> None:
    for cuts in [(7,), (4, 5, 20), range(1, checks_state.TOKENS)]:
        checks_state.assert_split_changes_nothing(attn, checks.rows(2, checks_state.TOKENS), cuts)


def split_of_padded_rows(attn: Any) -> None:
    valid = checks_state.padding("left", 2)
    checks_state.assert_split_changes_nothing(
        attn, checks.rows(2, checks_state.TOKENS), (5, 20, 21), valid
    )


def crop(attn: Any) -> None:
    for kept in (12, 13):
        checks_state.assert_crop_forgets(
            attn, checks.rows(2, checks_state.TOKENS), kept, reversible=9
        )


def selection(attn: Any) -> None:
    checks_state.assert_rows_can_be_chosen(attn, checks.rows(2, checks_state.TOKENS), [1, 0], None)


DEFECTS: list[tuple[Plant, tuple[str, ...], Callable[[Any], None]]] = [
    (average_that_restarts, MEMORY, split),
    (count_of_tokens_shared_over_rows, ("gqa", "mla", *MEMORY), split_of_padded_rows),
    (zeros_for("m"), MEMORY, split),
    (zeros_for("chunk_sum"), MEMORY, split),
    (crop_that_forgets("m"), MEMORY, crop),
    (crop_that_forgets("chunk_sum"), MEMORY, crop),
    (crop_that_only_counts, ("mha", "mla", *MEMORY), crop),
    (ring_too_small, ("gqa", "mla", "fmka"), split),
    (a_sink_that_is_forgotten_by_crop, ("gqa", "mla", *MEMORY), crop),
    (no_place_for_sinks, ("gqa", "mla", *MEMORY), split),
    (rows_left_in_place, ("mqa", "mla", *MEMORY), selection),
    (one_session_slot_late, ("mka",), split),
]
EACH = [
    pytest.param(plant, kind, check, id=f"{getattr(plant, '__qualname__', plant)}-{number}-{kind}")
    for number, (plant, kinds, check) in enumerate(DEFECTS)
    for kind in kinds
]


@pytest.mark.parametrize(("plant", "kind", "check"), EACH)
def test_the_state_turns_red(
    plant: Plant, kind: str, check: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    attn = checks.make(kind, "one chunk" if kind == "mka" else "small")
    check(attn)
    plant(monkeypatch)
    with pytest.raises((AssertionError, IndexError)):
        check(attn)
