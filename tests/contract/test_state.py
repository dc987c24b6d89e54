"""Decoding equals training: every mechanism with a carried state, in every variant."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import checks
from checks_state import (
    SIDES,
    TOKENS,
    assert_crop_forgets,
    assert_rows_can_be_chosen,
    assert_split_changes_nothing,
    in_calls,
    many_calls,
    padding,
    two_calls,
)

every_case = pytest.mark.parametrize(("kind", "variant"), checks.CASES)
every_padding = pytest.mark.parametrize("side", SIDES)
every_dtype = pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32], ids=["float64", "float32"]
)


def make(kind: str, variant: str, dtype: torch.dtype = torch.float64) -> Any:
    """In float32 every candidate is retrieved, so that rounding cannot choose another chunk."""
    changes: dict[str, Any] = (
        {"top_k": 100} if dtype != torch.float64 and variant != "literal" else {}
    )
    return checks.make(kind, variant, dtype, **changes)


@every_case
@every_padding
@every_dtype
def test_every_split_in_two(kind: str, variant: str, side: str, dtype: torch.dtype) -> None:
    attn, x, valid = make(kind, variant, dtype), checks.rows(3, TOKENS, dtype), padding(side, 3)
    for cuts in two_calls():
        assert_split_changes_nothing(attn, x, cuts, valid)


@every_case
@every_padding
@every_dtype
def test_fifty_splits_into_many(kind: str, variant: str, side: str, dtype: torch.dtype) -> None:
    attn, x, valid = make(kind, variant, dtype), checks.rows(3, TOKENS, dtype), padding(side, 3)
    for number, cuts in enumerate(many_calls()):
        assert_split_changes_nothing(attn, x, cuts, valid, reversible=number % 4)


@every_case
@pytest.mark.parametrize("columns", [2, 4, 9])
@torch.no_grad()
def test_one_token_among_padding(kind: str, variant: str, columns: int) -> None:
    """A call of several columns that brings every row a single token reads no further than its
    window."""
    attn, x = make(kind, variant), checks.rows(2, TOKENS)
    y, state = attn(x)[0], attn.initial_state(2)
    _, state = in_calls(attn, x[:, :20], (), state=state)
    valid = torch.zeros(2, columns, dtype=torch.bool)
    valid[0, 0] = valid[1, columns - 1] = True
    for t in range(20, 26):
        part = torch.full((2, columns, x.shape[2]), 1e6, dtype=x.dtype)
        part[valid] = x[:, t]
        checks.close(attn(part, valid=valid, state=state)[0][valid], y[:, t])


@every_case
@torch.no_grad()
def test_a_state_whose_call_ended_in_an_error_is_refused(kind: str, variant: str) -> None:
    """It has counted tokens that it does not hold."""
    attn, x = make(kind, variant), checks.rows(2, TOKENS)
    for seen in (0, 9):
        state = attn.initial_state(2)
        if seen:
            attn(x[:, :seen], state=state)

        def interrupted(*_: Any) -> None:
            raise KeyboardInterrupt

        hook = attn.get_submodule("o_proj").register_forward_pre_hook(interrupted)
        with pytest.raises(KeyboardInterrupt):
            attn(x[:, seen:20], state=state)
        hook.remove()
        with pytest.raises(
            ValueError, match=r"the state of \w+ is torn: a call on it ended in an error"
        ):
            attn(x[:, seen:20], state=state)


@every_case
@pytest.mark.parametrize("reversible", [0, 3])
def test_token_by_token(kind: str, variant: str, reversible: int) -> None:
    assert_split_changes_nothing(
        make(kind, variant), checks.rows(2, TOKENS), range(1, TOKENS), reversible=reversible
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.lists(st.booleans(), min_size=2 * TOKENS, max_size=2 * TOKENS),
    st.lists(st.integers(0, TOKENS), max_size=8).map(sorted),
    st.sampled_from(checks.CASES),
)
def test_any_padding_and_any_split(
    bits: list[bool], cuts: list[int], case: tuple[str, str]
) -> None:
    assert_split_changes_nothing(
        make(*case), checks.rows(2, TOKENS), cuts, torch.tensor(bits).view(2, TOKENS)
    )


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in checks.CASES}))
@pytest.mark.parametrize("window", [None, 5, 70])
@pytest.mark.parametrize("cuts", [(1,), (150,), (80, 81, 230), (40, 200)], ids=str)
@pytest.mark.parametrize("side", ["none", "left"])
def test_long_calls(kind: str, window: int | None, cuts: tuple[int, ...], side: str) -> None:
    """Calls longer than the window and than the blocks of the fast paths."""
    attn = checks.make(kind, local_window=window, chunk_size=7)
    assert_split_changes_nothing(attn, checks.rows(2, 301), cuts, padding(side, 2, 301))


@every_case
def test_rotary_positions_may_be_anything(kind: str, variant: str) -> None:
    attn, x = make(kind, variant), checks.rows(2, TOKENS)
    positions = torch.arange(TOKENS) * 3 + torch.tensor([[4], [1000]])
    state, outputs = attn.initial_state(2), []
    for part in (slice(0, 12), slice(12, 13), slice(13, TOKENS)):
        y, state = attn(x[:, part], positions=positions[:, part], state=state)
        outputs.append(y)
    checks.close(torch.cat(outputs, 1), attn(x, positions=positions)[0])


@every_case
def test_gradients_flow_through_the_state(kind: str, variant: str) -> None:
    attn, direction = make(kind, variant), checks.rows(2, TOKENS, seed=5)
    grads = []
    for cuts in ((), (7, 8, 20)):
        x = checks.rows(2, TOKENS).requires_grad_()
        y = in_calls(attn, x, cuts)[0] if cuts else attn(x)[0]
        wanted = [x, *attn.parameters()]
        grads.append(
            torch.autograd.grad(y, wanted, direction, allow_unused=True, materialize_grads=True)
        )
    for whole, split in zip(*grads, strict=True):
        checks.close(split, whole)


@every_case
def test_detached_state_has_no_history(kind: str, variant: str) -> None:
    x = checks.rows(2, TOKENS).requires_grad_()
    attn = make(kind, variant)
    _, state = in_calls(attn, x[:, :9], ())
    assert any(tensor.requires_grad for tensor in state.tensors.values())
    y, _ = attn(x[:, 9:], state=state.detach())
    (grad,) = torch.autograd.grad(y.sum(), x)
    assert (grad[:, :9] == 0).all()
    assert (grad[:, 9:] != 0).any()


@every_case
@pytest.mark.parametrize("kept", [1, 5, 6, 12, 20, 32])
def test_tokens_taken_back_leave_no_trace(kind: str, variant: str, kept: int) -> None:
    assert_crop_forgets(make(kind, variant), checks.rows(2, TOKENS), kept, reversible=9)


@every_case
def test_crop_further_back_names_the_limit(kind: str, variant: str) -> None:
    attn = make(kind, variant)
    _, state = in_calls(attn, checks.rows(2, TOKENS), (), reversible=4)
    if all(entry.latest is None for entry in state.entries.values()):
        assert state.crop(0).num_tokens.tolist() == [
            0,
            0,
        ]  # mha, mqa, gqa and mla without a window: any length
        return
    state = state.crop(TOKENS - 3)
    for num_tokens in (TOKENS - 5, 0):
        with pytest.raises(
            ValueError, match=rf"num_tokens is {num_tokens}; .* to {TOKENS - 4} tokens or more"
        ):
            state.crop(num_tokens)
    assert state.crop(TOKENS - 4).num_tokens.tolist() == [TOKENS - 4] * 2


@every_case
def test_crop_to_nothing_starts_anew(kind: str, variant: str) -> None:
    attn, x = make(kind, variant), checks.rows(2, TOKENS)
    _, state = in_calls(attn, checks.rows(2, 6, seed=9), (2,), reversible=6)
    checks.close(in_calls(attn, x, (4, 5), state=state.crop(0))[0], attn(x)[0])


@every_case
def test_crop_row_by_row(kind: str, variant: str) -> None:
    attn, x = make(kind, variant), checks.rows(2, TOKENS)
    _, state = in_calls(attn, x[:, :20], (6,), reversible=8)
    state = state.crop([20, 13])
    assert state.num_tokens.tolist() == [20, 13]
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[0, 13:] = False
    rest = torch.stack([torch.cat([x[0, 20:], torch.full((7, x.shape[2]), 1e6)]), x[1, 13:]])
    y, _ = in_calls(attn, rest, (3, 4), valid, state=state)
    whole = attn(x)[0]
    checks.close(y[0, :13], whole[0, 20:])
    checks.close(y[1], whole[1, 13:])


@every_case
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("chosen", [[2, 0, 1], [1, 1], [0], [2, 2, 0, 1]], ids=str)
def test_rows_can_be_chosen(kind: str, variant: str, side: str, chosen: list[int]) -> None:
    assert_rows_can_be_chosen(make(kind, variant), checks.rows(3, TOKENS), chosen, padding(side, 3))


@every_case
def test_repeat_and_reorder_are_selections(kind: str, variant: str) -> None:
    attn, x = make(kind, variant), checks.rows(2, TOKENS)
    whole = attn(x)[0][:, 20:]
    _, state = in_calls(attn, x[:, :20], (6,))
    state = state.repeat(2)
    assert state.num_tokens.tolist() == [20] * 4
    state = state.reorder(torch.tensor([3, 0]))
    checks.close(attn(x[[1, 0], 20:], state=state)[0], whole[[1, 0]])


@every_case
def test_a_state_can_be_moved(kind: str, variant: str) -> None:
    _, state = in_calls(make(kind, variant), checks.rows(2, 7), ())
    assert {x.device.type for x in state.to("meta").tensors.values()} == {"meta"}


@every_case
def test_a_state_in_another_dtype(kind: str, variant: str) -> None:
    """Keys and values are kept in it, and read as its numbers; the output has the dtype of x."""
    changes: dict[str, Any] = {"top_k": 100} if variant != "literal" else {}
    attn, x = checks.make(kind, variant, **changes), checks.rows(2, TOKENS)
    state = attn.initial_state(2, dtype=torch.bfloat16)
    y, state = in_calls(attn, x, (9, 10, 30), state=state)
    exact = attn(x)[0]
    assert y.dtype == torch.float64
    assert (y - exact).square().mean().sqrt() <= checks.RELATIVE_RMS[
        torch.bfloat16
    ] * exact.square().mean().sqrt()
    assert state.nbytes == attn.state_nbytes(2, TOKENS, torch.bfloat16)


@every_case
def test_a_token_copies_nothing_that_is_held(kind: str, variant: str) -> None:
    """Between two growths of a store every token is written where there was room."""
    attn, x = make(kind, variant), checks.rows(2, 80)
    _, state = in_calls(attn, x[:, :40], ())
    with torch.no_grad():
        _, state = in_calls(attn, x[:, 40:45], (1, 2, 3, 4), state=state)
        places = {name: tensor.data_ptr() for name, tensor in state.tensors.items()}
        _, state = in_calls(attn, x[:, 45:60], range(1, 15), state=state)
    assert {name: tensor.data_ptr() for name, tensor in state.tensors.items()} == places


def test_a_foreign_state_is_refused() -> None:
    x = checks.rows(2, 3)
    state = checks.make("gqa").initial_state(2)
    with pytest.raises(
        ValueError,
        match=r"state belongs to GroupedQueryAttention; pass one .*FastMemoryKeyedAttention",
    ):
        checks.make("fmka")(x, state=state)
    with pytest.raises(ValueError, match="holds 2 rows; x has 3"):
        checks.make("gqa")(checks.rows(3, 3), state=state)
    with pytest.raises(ValueError, match="other options of GroupedQueryAttention: its k is"):
        checks.make("gqa", local_window=6)(x, state=state)


@pytest.mark.parametrize("name", ["batch_size", "reversible"])
def test_a_state_of_a_wrong_size_is_refused(name: str) -> None:
    sizes: dict[str, Any] = {"batch_size": 1, name: -1}
    with pytest.raises(ValueError, match=f"{name} is -1"):
        checks.make("mka").initial_state(**sizes)


@every_case
def test_no_tokens_change_nothing(kind: str, variant: str) -> None:
    attn = make(kind, variant)
    y, state = attn(checks.rows(2, 0), state=attn.initial_state(2))
    assert y.shape == (2, 0, checks.HIDDEN_SIZE)
    assert state.num_tokens.tolist() == [0, 0]
