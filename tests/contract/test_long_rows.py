"""The contract at lengths that people use, with the options and sizes as they are: nothing is
patched."""

from typing import Any

import pytest
import torch

import checks
import checks_state
from checks_memory_state import state_of
from mka.attention import ATTENTION_TYPES, build_attention
from mka.ops.rotary import RotaryEmbedding

LENGTHS = (700, 2600, 5003)
MATES = (411, 1500, 4099)
every_kind = pytest.mark.parametrize("kind", ATTENTION_TYPES)
every_memory = pytest.mark.parametrize("kind", ["mka", "fmka"])


def make(kind: str) -> Any:
    """A layer as it is by default, but narrow; its weights are random."""
    shared: dict[str, Any] = {"hidden_size": checks.HIDDEN_SIZE, "num_heads": 2}
    if kind == "gqa":
        shared["num_kv_heads"] = 1
    rotary = RotaryEmbedding(8)
    attn = build_attention(
        kind, **shared, rotary=rotary, **({"qk_rope_head_dim": 8} if kind == "mla" else {})
    ).double()
    torch.manual_seed(1)
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return attn


@every_kind
@pytest.mark.parametrize("tokens", LENGTHS)
@torch.no_grad()
def test_any_calls_equal_one(kind: str, tokens: int) -> None:
    attn, x = make(kind), checks.rows(1, tokens)
    y = attn(x)[0]
    for cuts in ((), (tokens - 1,), (1, 130, tokens - 70), range(512, tokens, 512)):
        checks.close(checks_state.in_calls(attn, x, cuts)[0], y)


@every_kind
@torch.no_grad()
def test_rows_beside_longer_ones(kind: str) -> None:
    """In one call, in pieces with a state, and the next token after them: what each row gives
    alone."""
    attn, longest, t = make(kind), max(MATES), torch.arange(max(MATES) + 1)
    x = checks.rows(3, longest + 1)
    alone = [attn(x[row : row + 1, : length + 1])[0][0] for row, length in enumerate(MATES)]
    valid = t < torch.tensor(MATES)[:, None]
    together = attn(x[:, :-1], valid=valid[:, :-1])[0]
    y, state = checks_state.in_calls(attn, x[:, :-1], range(640, longest, 640), valid[:, :-1])
    following = torch.stack([x[row, length] for row, length in enumerate(MATES)]).unsqueeze(1)
    last, _ = attn(following, state=state)
    for row, length in enumerate(MATES):
        checks.close(together[row, :length], alone[row][:-1])
        checks.close(y[row, :length], alone[row][:-1])
        checks.close(last[row, 0], alone[row][-1])


@every_memory
@torch.no_grad()
def test_equals_the_naive_twin(kind: str) -> None:
    """The default sizes at the length at which a call was once off."""
    attn, x = make(kind), checks.rows(1, 2600)
    checks.close(attn(x, state=attn.initial_state(1))[0], checks.naive(attn, x))


@every_memory
@pytest.mark.parametrize("store", ["host", "disk"])
@torch.no_grad()
def test_chunks_kept_elsewhere(kind: str, store: str) -> None:
    attn, x = make(kind), checks.rows(1, max(LENGTHS))
    y, _ = checks_state.in_calls(attn, x, (1, 2000, 5000), state=state_of(attn, 1, store))
    checks.close(y, attn(x)[0])
