"""A decoded token copies nothing of what is held: what it allocates does not grow with the
context."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from checks import options_of
from mka.attention import ATTENTION_TYPES, build_attention

CHUNK, GROUPS = 16, 2
LENGTHS = (512, 4096)


class Allocated(TorchDispatchMode):
    """Bytes of the tensors that operators make, views and writes in place apart."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {storage(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **kwargs or {})
        made = {storage(leaf): leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}
        self.nbytes += sum(
            leaf.untyped_storage().nbytes() for place, leaf in made.items() if place not in given
        )
        return out


def storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


@torch.no_grad()
def allocated_by_a_token(kind: str, window: int | None, context: int) -> int:
    options = options_of(
        kind, {"local_window": window, "num_kv_heads": GROUPS, "chunk_size": CHUNK, "index_size": 8}
    )
    torch.manual_seed(0)
    attn = build_attention(kind, hidden_size=32, num_heads=4, **options)
    state = attn.initial_state(1)
    for part in torch.randn(1, context + 1, 32).split(
        [context, 1], dim=1
    ):  # the first token after it makes room
        _, state = attn(part, state=state)
    with Allocated() as allocated:
        attn(torch.randn(1, 1, 32), state=state)
    return allocated.nbytes


@pytest.mark.parametrize("window", [None, 64])
@pytest.mark.parametrize("kind", ATTENTION_TYPES)
def test_a_token_allocates_no_more_after_a_longer_context(kind: str, window: int | None) -> None:
    short, long = (allocated_by_a_token(kind, window, context) for context in LENGTHS)
    chunks = (LENGTHS[1] - LENGTHS[0]) // CHUNK
    # mka and fmka score the summary of every chunk, and mka every session slot: some numbers for
    # each, no key.
    scores = 64 * GROUPS * chunks if kind in ("mka", "fmka") else 0
    assert 0 <= long - short <= scores
