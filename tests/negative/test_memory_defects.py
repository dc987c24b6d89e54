"""Defects of a long-term memory, planted: the tests of its store, its search and its selection turn
red."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import checks
import checks_state
from mka.attention.mka import MemoryKeyedAttention
from mka.memory import held, longterm, search
from mka.memory.disk import DiskStore
from mka.memory.options import LongTermConfig
from mka.memory.places import LongTerm
from mka.memory.search import Limits
from mka.memory.state import State
from mka.memory.store import MemoryStore

Plant = Callable[[pytest.MonkeyPatch], None]


def a_chunk_may_retrieve_itself(patch: pytest.MonkeyPatch) -> None:
    """Chunks inside the window, the query's own included."""
    patch.setattr(Limits, "end", lambda limits, t: t // limits.chunk_size + 1 + limits.banked)
    patch.setattr(
        Limits, "reach", lambda limits, context: context // limits.chunk_size + 1 + limits.banked
    )


def a_tie_goes_to_the_later_chunk(patch: pytest.MonkeyPatch) -> None:
    real = search.top_by_place

    def later(scores: Tensor, top_k: int, **options: Any) -> tuple[Tensor, Tensor]:
        best, place = real(scores.flip(-1).contiguous(), top_k, **options)
        return best, scores.shape[-1] - 1 - place

    patch.setattr(search, "top_by_place", later)


def equal_ones_as_they_come(patch: pytest.MonkeyPatch) -> None:
    """The best by topk, which does not say which of equal scores it takes: here the last."""

    def any_order(scores: Tensor, top_k: int, **_: Any) -> tuple[Tensor, Tensor]:
        count = min(top_k, scores.shape[-1])
        order = torch.sort(scores.flip(-1), dim=-1, descending=True, stable=True)
        return order.values[..., :count], scores.shape[-1] - 1 - order.indices[..., :count]

    patch.setattr(search, "top_by_place", any_order)


def a_distance_off_by_one_chunk(patch: pytest.MonkeyPatch) -> None:
    real = MemoryKeyedAttention.places

    def shifted(attn: Any, x: Tensor, positions: Any, state: Any) -> Any:
        places = real(attn, x, positions, state)
        return None if places is None else places - attn.chunk_size

    patch.setattr(MemoryKeyedAttention, "places", shifted)


def sinks_are_read_again_in_their_chunk(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(MemoryKeyedAttention, "hidden_sinks", property(lambda attn: 0))


def heads_choose_by_their_sum(patch: pytest.MonkeyPatch) -> None:
    """The scores of a group's heads are added before the softmax."""
    real = search.products

    def summed(queries: Tensor, keys: Tensor) -> Tensor:
        return real(queries.sum(2, keepdim=True).expand_as(queries), keys)

    patch.setattr(search, "products", summed)


def keys_choose_without_the_window(patch: pytest.MonkeyPatch) -> None:
    """A head that reads its window alone has as much to say as one that reads chunks."""
    real = search.best_by_keys
    patch.setattr(
        held,
        "best_by_keys",
        lambda proposed, sums, window, k: real(proposed, sums, window - 1e9, k),
    )


def sinks_make_their_chunk_attractive(patch: pytest.MonkeyPatch) -> None:
    """Sinks, which are not read in their chunk, count where it is chosen."""
    real = longterm.sums_in_chunks
    patch.setattr(held, "sums_in_chunks", lambda *args, sinks=0, **options: real(*args, **options))


def the_bias_is_forgotten_where_chunks_are_chosen(patch: pytest.MonkeyPatch) -> None:
    real = MemoryKeyedAttention.read_long_term

    def without(
        attn: Any, raw: tuple[Tensor, Tensor], rotated: Any, v: Tensor, window: Tensor, *rest: Any
    ) -> Any:
        return real(attn, raw, rotated, v, window + attn.router.biases(raw[0])[..., 2], *rest)

    patch.setattr(MemoryKeyedAttention, "read_long_term", without)


def a_summary_that_counts_padding(patch: pytest.MonkeyPatch) -> None:
    real = longterm.write_chunk_means

    def counted(x: Tensor, chunk_size: int, state: State, sinks: int = 0) -> Tensor:
        past, lengths = state.past, state.lengths
        state.past, state.lengths = [max(past)] * len(past), [max(lengths)] * len(past)
        try:
            return real(x, chunk_size, state, sinks)
        finally:
            state.past, state.lengths = past, lengths

    patch.setattr(
        "mka.attention.mka.PROPOSED", 1
    )  # keys that choose among what the means propose would mend it
    for kind in ("mka", "fmka"):
        patch.setattr(f"mka.attention.{kind}.write_chunk_means", counted)


def written_one_entry_late(patch: pytest.MonkeyPatch) -> None:
    for kind in (MemoryStore, DiskStore):
        real = kind.write

        def late(store: Any, row: int, start: int, values: Tensor, real: Any = real) -> None:
            real(store, row, max(0, start - 1), values)

        patch.setattr(kind, "write", late)


def rows_share_a_store(patch: pytest.MonkeyPatch) -> None:
    for kind in (MemoryStore, DiskStore):
        real = kind.read
        patch.setattr(
            kind,
            "read",
            lambda store, row, chunk, group, real=real: real(store, row * 0, chunk, group),
        )


def rows_are_not_selected(patch: pytest.MonkeyPatch) -> None:
    for kind in (MemoryStore, DiskStore):
        patch.setattr(kind, "_select", lambda *_: None)


def started(attn: Any, rows: int) -> State:
    return attn.initial_state(rows, longterm=LongTerm.of(LongTermConfig(longterm_store="disk")))


@torch.no_grad()
def in_pieces(attn: Any, valid: Tensor | None = None, equal_rows: bool = False) -> None:
    """Through the disk, against one call without a state."""
    x = checks.rows(3, checks_state.TOKENS)
    if equal_rows:
        x[:, 3:21] = x[:, :3].repeat(1, 6, 1)  # the same chunk over and over
    state = started(attn, 3)
    y, _ = checks_state.in_calls(attn, x, [4, 5, 20], valid, state=state)
    checks.close(y, attn(x, valid=valid)[0])


def exact_pieces(attn: Any) -> None:
    in_pieces(attn)


def padded_pieces(attn: Any) -> None:
    in_pieces(attn, valid=checks_state.padding("left", 3))


@torch.no_grad()
def chosen_rows(attn: Any) -> None:
    x, state = checks.rows(2, checks_state.TOKENS), started(attn, 2)
    checks_state.in_calls(attn, x[:, :20], [7], state=state)
    y, _ = checks_state.in_calls(attn, x[[1, 0], 20:], [3], state=state.select([1, 0]))
    checks.close(y, attn(x[[1, 0]])[0][:, 20:])


def against_naive(attn: Any) -> None:
    checks.assert_equals_naive(attn, checks.rows(2, checks_state.TOKENS))


def ties_against_naive(attn: Any) -> None:
    """Chunks with one summary and different tokens: which of them is read decides what comes
    out."""
    x = checks.rows(1, checks_state.TOKENS)
    for start in range(3, 21, 3):
        x[:, start : start + 3] = x[:, :3].flip(1) if start % 2 else x[:, :3]
    attn.chunk_size = 3
    queries, summaries = x[:, :, None], longterm.chunk_means(x, 3)[:, :, None]
    chosen = search.retrieve(queries, summaries * 0, Limits(3, 4, 2))
    assert torch.equal(chosen.chunk[0, -1, 0], torch.tensor([0, 1]))


def far_against_naive(attn: Any) -> None:
    """Rotary, and longer than the distance that keys may have."""
    checks.assert_equals_naive(checks.make("mka", "far"), checks.rows(2, checks_state.TOKENS))


MEMORIES = ("mka", "fmka")
DEFECTS: list[tuple[Plant, tuple[str, ...], Callable[[Any], None]]] = [
    (a_chunk_may_retrieve_itself, MEMORIES, against_naive),
    (a_tie_goes_to_the_later_chunk, ("mka",), ties_against_naive),
    (equal_ones_as_they_come, ("mka",), ties_against_naive),
    (a_distance_off_by_one_chunk, ("mka",), far_against_naive),
    (sinks_are_read_again_in_their_chunk, ("mka",), against_naive),
    (heads_choose_by_their_sum, ("mka",), against_naive),
    (keys_choose_without_the_window, ("mka",), against_naive),
    (sinks_make_their_chunk_attractive, ("mka",), against_naive),
    (the_bias_is_forgotten_where_chunks_are_chosen, ("mka",), against_naive),
    (a_summary_that_counts_padding, MEMORIES, padded_pieces),
    (written_one_entry_late, MEMORIES, exact_pieces),
    (rows_share_a_store, MEMORIES, exact_pieces),
    (rows_are_not_selected, MEMORIES, chosen_rows),
]


@pytest.mark.parametrize(
    ("plant", "kind", "check"),
    [(plant, kind, check) for plant, kinds, check in DEFECTS for kind in kinds],
)
def test_the_memory_turns_red(
    plant: Plant, kind: str, check: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    attn = checks.make(kind, "one chunk" if kind == "mka" else "small")
    check(attn)
    plant(monkeypatch)
    with pytest.raises((AssertionError, IndexError)):
        check(attn)
