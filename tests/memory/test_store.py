"""The long-term store: decoding gives what one call gives, wherever chunks are kept and however they are found."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import checks
from checks_state import SIDES, TOKENS, many_calls, padding
from disks import files, full_at
from mka.attention import CausalAttention
from mka.config import SEARCHES, STORES, InputError, LongTermConfig
from mka.memory.disk import DiskStore
from mka.memory.places import LongTerm
from mka.memory.state import State
from mka.memory.store import Budget, MemoryStore, RecordForm, Store

MEMORIES = ("mka", "fmka")
VARIANTS = ("small", "rotary", "no-window")
PLACES = [(store, search) for store in STORES for search in SEARCHES if (store, search) != ("device", "exact")]


def longterm(store: str = "disk", search: str = "exact", **options: Any) -> LongTerm:
    return LongTerm.of(LongTermConfig(longterm_store=store, longterm_search=search, **options))  # pyright: ignore


@torch.no_grad()
def in_calls(
    attn: CausalAttention, x: Tensor, cuts: Sequence[int], state: State, valid: Tensor | None = None
) -> Tensor:
    parts = pairwise([0, *cuts, x.shape[1]])
    return torch.cat([attn(x[:, a:b], valid=None if valid is None else valid[:, a:b], state=state)[0] for a, b in parts], 1)


@pytest.mark.parametrize("kind", MEMORIES)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("store", "search"), PLACES)
@pytest.mark.parametrize("side", SIDES)
def test_calls_equal_one_call(kind: str, variant: str, store: str, search: str, side: str) -> None:
    if search == "faiss":
        pytest.importorskip("faiss", reason="faiss is not installed")
    attn, x, valid = checks.make(kind, variant), checks.rows(3, TOKENS), padding(side, 3)
    if kind == "mka" and variant == "no-window":
        with pytest.raises(InputError, match="retrieves nothing"):
            attn.initial_state(3, longterm=longterm(store, search))
        return
    whole = attn(x, valid=valid)[0]
    for number, cuts in enumerate([(), range(1, TOKENS), *many_calls(6)]):
        where = longterm(store, search)
        state = attn.initial_state(3, reversible=number, longterm=where)
        checks.close(in_calls(attn, x, cuts, state, valid), whole)
        seen = [TOKENS] * 3 if valid is None else valid.sum(1).tolist()
        assert state.nbytes == sum(attn.state_nbytes(1, n, x.dtype, number, where) for n in seen)
        assert state.allocated_nbytes >= state.nbytes
