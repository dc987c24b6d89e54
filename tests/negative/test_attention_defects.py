"""Planted in the attention: what the original did, and what is easy to get wrong. The contract turns red for each."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import checks
import checks_memory
from mka.memory import longterm, session
from mka.memory.router import Router
from mka.ops import attend
from mka.ops.packing import Packing

TOKENS = 23
MEMORY = ("mka", "fmka")
ALL = ("mha", "mqa", "gqa", "mla", *MEMORY)
every_memory_kind = pytest.mark.parametrize("kind", MEMORY)
Plant = Callable[[pytest.MonkeyPatch], None]


def mean_over_the_whole_row(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(session, "causal_average", lambda x, decay: x.mean(1, keepdim=True).expand_as(x))


def no_causal_mask(patch: pytest.MonkeyPatch) -> None:
    real = attend.scaled_dot_product_attention
    patch.setattr(
        attend, "scaled_dot_product_attention", lambda *qkv, **options: real(*qkv, **options | {"is_causal": False})
    )


def window_one_token_too_wide(patch: pytest.MonkeyPatch) -> None:
    real = attend._band
    patch.setattr(attend, "_band", lambda rows, columns, window, device: real(rows, columns, window + 1, device))


def candidates(patch: pytest.MonkeyPatch, rule: Callable[[Tensor, int, int], Tensor]) -> None:
    patch.setattr(longterm, "num_candidates", rule)
    patch.setattr("mka.attention.grouped.num_candidates", rule)


def chunks_not_yet_completed(patch: pytest.MonkeyPatch) -> None:
    candidates(patch, lambda t, chunk_size, window: t // chunk_size + 1)


def chunks_inside_the_window(patch: pytest.MonkeyPatch) -> None:
    candidates(patch, lambda t, chunk_size, window: (t + 1) // chunk_size)


def padding_counts(patch: pytest.MonkeyPatch) -> None:
    in_place = torch.arange(TOKENS)
    patch.setattr("mka.attention.base.packing", lambda valid: Packing(in_place.expand(valid.shape), valid))


def no_mask_in_the_router(patch: pytest.MonkeyPatch) -> None:
    real = Router.forward
    patch.setattr(Router, "forward", lambda router, q, exists: real(router, q, torch.ones_like(exists)))


def ties_to_the_later_chunk(patch: pytest.MonkeyPatch, later_wins: bool = True) -> None:
    for kind in MEMORY:
        patch.setattr(f"mka.attention.{kind}.retrieve", partial(checks_memory.brute_force, later_wins=later_wins))


def every_slot_is_read(patch: pytest.MonkeyPatch) -> None:
    real = session.attend_slots
    patch.setattr(
        "mka.attention.mka.attend_slots", lambda q, k, v, stride, _, *rest: real(q, k, v, stride, None, *rest)
    )


def infinities_reach_the_attention(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("mka.attention.base.bounded", lambda x: x)


def chunks_merged_without_their_sums(patch: pytest.MonkeyPatch) -> None:
    """Every retrieved chunk weighs the same, whatever its scores."""

    def mean_of_chunks(q: Tensor, k: Tensor, v: Tensor, retrieved: longterm.Retrieved, chunk_size: int) -> Tensor:
        parts = [
            longterm.gather_chunks(q, k, v, longterm.Retrieved(*(x[..., i, None] for x in retrieved)), chunk_size)
            for i in range(retrieved.chunk.shape[3])
        ]
        return torch.stack(parts).mean(0)

    patch.setattr("mka.attention.mka.attend_chunks", mean_of_chunks)


def causal_gradient(attn: Any) -> None:
    checks.assert_no_gradient_from_future(attn, checks.rows(2, TOKENS))


def causal_values(attn: Any) -> None:
    checks.assert_future_values_ignored(attn, checks.rows(2, TOKENS), huge=-1e3)


def largest_values(attn: Any) -> None:
    checks.assert_largest_values_ignored(attn, checks.rows(2, TOKENS))


def naive_parity(attn: Any) -> None:
    checks.assert_equals_naive(attn, checks.rows(2, TOKENS))


def padding_ignored(attn: Any) -> None:
    valid = torch.arange(TOKENS) >= torch.tensor([[0], [6]])
    checks.assert_padding_ignored(attn, checks.rows(2, TOKENS), valid)


# Plant, mechanisms, variant in which it can show, checks that must each turn red.
DEFECTS: list[tuple[Plant, tuple[str, ...], str, tuple[Callable[[Any], None], ...]]] = [
    (mean_over_the_whole_row, MEMORY, "small", (causal_gradient, causal_values, naive_parity)),
    (mean_over_the_whole_row, MEMORY, "literal", (causal_gradient, causal_values, naive_parity)),
    (no_causal_mask, ALL, "no-window", (causal_gradient, causal_values, naive_parity)),
    (window_one_token_too_wide, ALL, "small", (naive_parity,)),
    (chunks_not_yet_completed, MEMORY, "small", (causal_gradient, causal_values, naive_parity)),
    (chunks_inside_the_window, MEMORY, "small", (naive_parity,)),
    (padding_counts, ALL, "small", (padding_ignored,)),
    (no_mask_in_the_router, MEMORY, "small", (naive_parity,)),
    (every_slot_is_read, ("mka",), "small", (naive_parity,)),
    (chunks_merged_without_their_sums, ("mka",), "small", (naive_parity,)),
    (infinities_reach_the_attention, ("mha", "mla", *MEMORY), "no-window", (largest_values,)),
]
EACH = [
    pytest.param(plant, kind, variant, check, id=f"{plant.__name__}-{kind}-{variant}-{check.__name__}")
    for plant, kinds, variant, turned_red in DEFECTS
    for kind in kinds
    for check in turned_red
]


@pytest.mark.parametrize(("plant", "kind", "variant", "check"), EACH)
def test_the_contract_turns_red(
    plant: Plant, kind: str, variant: str, check: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    attn = checks.make(kind, variant)
    check(attn)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check(attn)


def with_every_score_tied(kind: str) -> Any:
    """Summary keys of zero: every score is zero exactly, while the chunks' contents differ."""
    attn = checks.make(kind)
    torch.nn.init.zeros_(attn.get_parameter({"mka": "k_proj.weight", "fmka": "index_k_proj.weight"}[kind]))
    return attn


@every_memory_kind
def test_ties_the_other_way_turn_parity_red(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    attn = with_every_score_tied(kind)
    naive_parity(attn)
    ties_to_the_later_chunk(monkeypatch, later_wins=False)
    naive_parity(attn)
    ties_to_the_later_chunk(monkeypatch)
    with pytest.raises(AssertionError):
        naive_parity(attn)


def test_ties_the_other_way_turn_retrieval_red() -> None:
    checks_memory.assert_earlier_chunk_wins_ties(checks_memory.brute_force)
    with pytest.raises(AssertionError):
        checks_memory.assert_earlier_chunk_wins_ties(partial(checks_memory.brute_force, later_wins=True))


@pytest.mark.parametrize("plant", [chunks_not_yet_completed, chunks_inside_the_window])
def test_wrong_candidates_turn_retrieval_red(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        x = checks.rows(1, TOKENS).unsqueeze(2)
        retrieved = longterm.retrieve(x, longterm.chunk_means(x, 3), chunk_size=3, window=5, top_k=2)
        checks_memory.assert_only_completed_chunks_outside_the_window(retrieved, 3, 5)

    check()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()
