"""The guarantees of a carried state as functions: for the contract, and for the planted defects."""

import random
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

import checks
from mka.attention import CausalAttention
from mka.memory.state import State

TOKENS = 33
SIDES = ("none", "left", "right", "interior")


def padding(side: str, batch: int, tokens: int = TOKENS) -> Tensor | None:
    """Rows of the whole length, about half of it and a single token, the others empty at that
    side."""
    if side == "none":
        return None
    t = torch.arange(tokens)
    lengths = torch.tensor([tokens, tokens // 2 + 1, 1])[:batch, None]
    return {
        "left": t >= tokens - lengths,
        "right": t < lengths,
        "interior": (t * 7) % tokens < lengths,
    }[side]


def two_calls() -> list[tuple[int, ...]]:
    return [(cut,) for cut in range(TOKENS + 1)]


def many_calls(number: int = 50) -> list[tuple[int, ...]]:
    draw = random.Random(11)
    return [
        tuple(sorted(draw.choices(range(TOKENS + 1), k=draw.randint(2, 12)))) for _ in range(number)
    ]


def in_calls(
    attn: CausalAttention,
    x: Tensor,
    cuts: Sequence[int],
    valid: Tensor | None = None,
    state: State | None = None,
    reversible: int = 0,
) -> tuple[Tensor, State]:
    """The outputs of several calls side by side, and the state after the last."""
    held = state or attn.initial_state(x.shape[0], reversible=reversible)
    outputs = []
    for start, stop in pairwise([0, *cuts, x.shape[1]]):
        y, after = attn(
            x[:, start:stop], valid=None if valid is None else valid[:, start:stop], state=held
        )
        assert after is held
        outputs.append(y)
    return torch.cat(outputs, dim=1), held


@torch.no_grad()
def assert_split_changes_nothing(
    attn: CausalAttention,
    x: Tensor,
    cuts: Sequence[int],
    valid: Tensor | None = None,
    reversible: int = 0,
) -> None:
    y, state = in_calls(attn, x, cuts, valid, reversible=reversible)
    checks.close(y, attn(x, valid=valid)[0])
    seen = [x.shape[1]] * x.shape[0] if valid is None else valid.sum(1).tolist()
    assert state.num_tokens.tolist() == seen
    assert state.nbytes == sum(attn.state_nbytes(1, n, x.dtype, reversible) for n in seen)
    assert state.allocated_nbytes >= state.nbytes


def assert_crop_forgets(attn: CausalAttention, x: Tensor, kept: int, reversible: int = 0) -> None:
    """After a detour of other tokens that is taken back, the outputs are those of a row that never
    saw them."""
    y = attn(x)[0]
    _, state = in_calls(attn, x[:, :kept], [kept // 2], reversible=reversible)
    detour = checks.rows(x.shape[0], reversible or 9, x.dtype, seed=77)
    _, state = in_calls(attn, detour, [len(detour) // 3], state=state)
    state = state.crop(kept)
    assert state.num_tokens.tolist() == [kept] * x.shape[0]
    rest = x.shape[1] - kept
    checks.close(
        in_calls(attn, x[:, kept:], sorted([min(1, rest), rest // 2]), state=state)[0], y[:, kept:]
    )


def assert_rows_can_be_chosen(
    attn: CausalAttention, x: Tensor, chosen: Sequence[int], valid: Tensor | None
) -> None:
    """Halfway the rows are taken in another order, some twice: each goes on as itself."""
    half, rows = x.shape[1] // 2, list(chosen)
    _, state = in_calls(
        attn, x[:, :half], [3], None if valid is None else valid[:, :half], reversible=4
    )
    state = state.select(rows)
    later = None if valid is None else valid[rows, half:]
    y, _ = in_calls(attn, x[rows, half:], [2], later, state=state)
    checks.close(y, attn(x, valid=valid)[0][rows, half:])
