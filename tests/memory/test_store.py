"""The long-term store: decoding gives what one call gives, wherever chunks are kept and however
they are found."""

import os
import subprocess
import sys
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import checks
from checks_state import SIDES, TOKENS, many_calls, padding
from disks import files, full_at
from mka.attention import CausalAttention
from mka.errors import InputError
from mka.memory import disk
from mka.memory import longterm as longterm_module
from mka.memory.disk import DiskStore
from mka.memory.options import STORES, LongTermConfig
from mka.memory.places import LongTerm
from mka.memory.state import State
from mka.memory.store import Budget, MemoryStore, RecordForm, Store

MEMORIES = ("mka", "fmka")
VARIANTS = ("small", "rotary", "no-window", "far", "routed", "routed far", "clamped")
PLACES = [store for store in STORES if store != "device"]
FORM = RecordForm(groups=2, block=3, width=4, dtype=torch.float32)


def longterm(store: Any = "disk", **options: Any) -> LongTerm:
    return LongTerm.of(LongTermConfig(longterm_store=store, **options))


@torch.no_grad()
def in_calls(
    attn: CausalAttention, x: Tensor, cuts: Sequence[int], state: State, valid: Tensor | None = None
) -> Tensor:
    parts = pairwise([0, *cuts, x.shape[1]])
    outputs = [
        attn(x[:, a:b], valid=None if valid is None else valid[:, a:b], state=state)[0]
        for a, b in parts
    ]
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        (kind, variant)
        for kind in MEMORIES
        for variant in VARIANTS
        if kind == "mka" or variant not in checks.OF_MKA
    ],
)
@pytest.mark.parametrize("store", PLACES)
@pytest.mark.parametrize("side", SIDES)
def test_calls_equal_one_call(kind: str, variant: str, store: str, side: str) -> None:
    attn, x, valid = checks.make(kind, variant), checks.rows(3, TOKENS), padding(side, 3)
    if kind == "mka" and variant == "no-window":
        with pytest.raises(InputError, match="retrieves nothing"):
            attn.initial_state(3, longterm=longterm(store))
        return
    whole = attn(x, valid=valid)[0]
    for number, cuts in enumerate([(), range(1, TOKENS), *many_calls(4)]):
        where = longterm(store)
        state = attn.initial_state(3, reversible=number, longterm=where)
        checks.close(in_calls(attn, x, cuts, state, valid), whole)
        seen = [TOKENS] * 3 if valid is None else valid.sum(1).tolist()
        assert state.nbytes == sum(attn.state_nbytes(1, n, x.dtype, number, where) for n in seen)
        assert state.allocated_nbytes >= state.nbytes


@pytest.mark.parametrize("kind", MEMORIES)
@pytest.mark.parametrize("store", ["host", "disk"])
@pytest.mark.parametrize("queries", [1, 4, 7])
@pytest.mark.parametrize("side", SIDES)
def test_tiles_fetched_ahead_change_nothing(
    kind: str, store: str, queries: int, side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few queries to a tile; those of the next one are fetched by another thread."""
    attn, x, valid = checks.make(kind, "rotary"), checks.rows(3, TOKENS), padding(side, 3)
    pairs = (
        3 * attn.num_kv_heads * 2 * 2 * 3 * attn.head_dim * 8
        if kind == "mka"
        else 3 * 2 * attn.hidden_size * 8
    )
    monkeypatch.setattr(longterm_module, "TILE_BYTES", queries * pairs)
    state = attn.initial_state(3, longterm=longterm(store))
    checks.close(in_calls(attn, x, [20], state, valid), attn(x, valid=valid)[0])


@pytest.mark.parametrize("kind", MEMORIES)
@pytest.mark.parametrize("store", PLACES)
@pytest.mark.parametrize("kept", [14, 15, 17])
def test_crop_forgets(kind: str, store: str, kept: int) -> None:
    attn, x = checks.make(kind, "rotary"), checks.rows(2, TOKENS)
    whole = attn(x)[0]
    state = attn.initial_state(2, reversible=9, longterm=longterm(store))
    in_calls(attn, x[:, :kept], [kept // 2], state)
    in_calls(attn, checks.rows(2, 9, seed=77), [4], state)
    state = state.crop(kept)
    checks.close(in_calls(attn, x[:, kept:], [1], state), whole[:, kept:])


@pytest.mark.parametrize("kind", MEMORIES)
@pytest.mark.parametrize("store", PLACES)
def test_rows_can_be_chosen(kind: str, store: str) -> None:
    attn, x = checks.make(kind), checks.rows(3, TOKENS)
    state = attn.initial_state(3, longterm=longterm(store))
    in_calls(attn, x[:, :20], [7], state)
    chosen = [2, 0, 2, 2]
    state = state.select(chosen)
    other = x[chosen].clone()
    other[3, 20:] += 1  # two rows that were one go ways of their own
    checks.close(in_calls(attn, other[:, 20:], [3], state), attn(other)[0][:, 20:])


@pytest.mark.parametrize("store", ["host", "disk"])
def test_what_is_kept_apart_has_no_gradient(store: str) -> None:
    attn, x = checks.make("mka"), checks.rows(1, 4)
    with pytest.raises(InputError, match=r"no gradient: use torch\.no_grad\(\)"):
        attn(x, state=attn.initial_state(1, longterm=longterm(store)))


@pytest.mark.parametrize("store", PLACES)
@pytest.mark.parametrize("kind", ["mha", "mla"])
def test_mechanisms_without_memory_refuse(kind: str, store: str) -> None:
    with pytest.raises(InputError, match="retrieves nothing; allowed: longterm_store device"):
        checks.make(kind).initial_state(1, longterm=longterm(store))


# The stores alone.


def make_store(kind: str, rows: int = 1, budget: Budget | None = None) -> Store:
    budget = budget or Budget()
    return MemoryStore(FORM, rows, budget) if kind == "host" else DiskStore(FORM, rows, budget)


def entries(count: int, seed: int = 0) -> Tensor:
    return torch.randn(
        count, FORM.groups, FORM.width, generator=torch.Generator().manual_seed(seed)
    )


@pytest.mark.parametrize("kind", ["host", "disk"])
@pytest.mark.parametrize("cuts", [(), (1,), (3,), (4, 5, 11), tuple(range(1, 20))])
def test_a_record_is_its_entries(kind: str, cuts: tuple[int, ...]) -> None:
    store, x = make_store(kind, rows=2), entries(20)
    for start, stop in pairwise([0, *cuts, 20]):
        store.reserve(stop)
        for row in range(2):
            store.write(row, start, x[start:stop] + row)
    row, chunk, group = (
        torch.tensor([0, 1, 1, 0]),
        torch.tensor([5, 0, 2, 0]),
        torch.tensor([1, 0, 1, 0]),
    )
    found = store.read(row, chunk, group)
    for r, j, g, record in zip(row.tolist(), chunk.tolist(), group.tolist(), found, strict=True):
        assert torch.equal(record, x[3 * j : 3 * j + 3, g] + r)
    assert torch.equal(store.entries(1, 4, 13), x[4:17] + 1)


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_bytes_survive_as_they_are(kind: str) -> None:
    """NaN, infinities and both zeros come back bit by bit, bfloat16 too."""
    form = FORM._replace(dtype=torch.bfloat16)
    raw = torch.arange(3 * 8, dtype=torch.int16) * 2749 - 32768
    x = raw.view(torch.bfloat16).view(3, 2, 4)
    store = MemoryStore(form, 1, Budget()) if kind == "host" else DiskStore(form, 1, Budget())
    store.reserve(3)
    store.write(0, 0, x)
    assert torch.equal(store.entries(0, 0, 3).reshape(-1).view(torch.int16), raw)


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_the_limit_is_that_of_all_stores_together(kind: str) -> None:
    budget = Budget(3 * FORM.chunk_bytes)
    first, second = make_store(kind, budget=budget), make_store(kind, budget=budget)
    first.reserve(6)
    with pytest.raises(
        InputError,
        match=r"longterm_gib is .*; the long-term store holds 192 bytes and needs 192 more",
    ):
        second.reserve(6)
    second.reserve(3)
    assert budget.used == budget.limit


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_what_is_let_go_of_can_be_taken_again(kind: str) -> None:
    budget = Budget(6 * FORM.chunk_bytes)
    store = make_store(kind, 2, budget)
    store.reserve(6)
    with pytest.raises(InputError, match="needs 384 more"):
        store.select([0, 1, 1, 0])
    store.select([1])
    store.select([0, 0, 0])
    assert budget.used == budget.limit
    del store
    assert budget.used == 0


def test_a_file_has_no_name(tmp_path: Path) -> None:
    store = DiskStore(FORM, 2, Budget(), str(tmp_path))
    store.reserve(9)
    assert files(tmp_path) == set()


def test_a_killed_process_leaves_nothing(tmp_path: Path) -> None:
    code = (
        "import os, sys, torch\n"
        "from mka.memory.disk import DiskStore\nfrom mka.memory.store import Budget, RecordForm\n"
        "store = DiskStore(RecordForm(1, 2, 3, torch.float32), 1, Budget(), sys.argv[1]); "
        "store.reserve(99)\n"
        "store.write(0, 0, torch.ones(99, 1, 3)); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == -9
    assert files(tmp_path) == set()


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"longterm_folder is .*; it cannot hold the long-term store: No such file"
    ):
        DiskStore(FORM, 1, Budget(), str(tmp_path / "none"))


def test_a_full_disk_is_said_before_anything_changes(tmp_path: Path) -> None:
    """The state is as before the call, and goes on when there is room."""
    attn, x = checks.make("mka"), checks.rows(1, TOKENS)
    whole = attn(x)[0]
    state = attn.initial_state(1, longterm=longterm(longterm_folder=str(tmp_path)))
    in_calls(attn, x[:, :12], [], state)
    with (
        full_at(1000),
        pytest.raises(InputError, match="cannot hold the long-term store: File too large"),
    ):
        in_calls(attn, x[:, 12:30], [], state)
    assert state.num_tokens.tolist() == [12]
    checks.close(in_calls(attn, x[:, 12:], [20], state), whole[:, 12:])


@pytest.mark.parametrize("kind", ["host", "disk"])
def test_a_limit_leaves_the_state_as_it_was(kind: str) -> None:
    attn, x = checks.make("mka"), checks.rows(1, TOKENS)
    state = attn.initial_state(1, longterm=longterm(kind, longterm_gib=2500 / 2**30))
    in_calls(attn, x[:, :15], [], state)
    with pytest.raises(InputError, match="needs"):
        in_calls(attn, x[:, 15:], [], state)
    assert state.num_tokens.tolist() == [15]
    checks.close(in_calls(attn, x[:, 15:16], [], state), attn(x[:, :16])[0][:, 15:])


def test_files_are_closed_with_the_state() -> None:
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    store = DiskStore(FORM, 3, Budget())
    store.reserve(9)
    store.select([0, 0])
    del store
    assert before == (len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0)


def test_pages_read_are_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a read of many records has mapped is not resident afterwards."""
    monkeypatch.setattr(disk, "SMALL_READ", 0)
    form = RecordForm(groups=1, block=64, width=64, dtype=torch.float32)
    store = DiskStore(form, 1, Budget())
    store.reserve(64 * 1024)
    store.write(0, 0, torch.ones(64 * 1024, 1, 64))
    chunk = torch.arange(1024)
    before = file_pages()
    if before is None:
        pytest.skip("no /proc/self/statm here: resident pages of files cannot be counted")
    for some in chunk.split(64):
        store.read(torch.zeros_like(some), some, torch.zeros_like(some))
    after = file_pages()
    assert after is not None
    assert after - before < 1024  # of the 4,096 pages that were read


def file_pages() -> int | None:
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[2]) if path.exists() else None
