"""Planted in the attention: what the original did, and what is easy to get wrong. The contract
turns red for each."""

from collections.abc import Callable
from functools import partial
from typing import Any, cast

import pytest
import torch
from torch import Tensor

import checks
import checks_memory
from mka.attention.mka import MemoryKeyedAttention
from mka.memory import held, longterm, session
from mka.memory.held import Meeting
from mka.memory.router import Router
from mka.memory.search import Limits, Retrieved, retrieve
from mka.ops import attend, fused
from mka.ops.attend import Window
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
        attend,
        "scaled_dot_product_attention",
        lambda *qkv, **options: real(*qkv, **options | {"is_causal": False}),
    )
    summed = cast(Any, attend.attention_with_lse)

    def everything(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Any:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool) if mask is None else mask
        return summed(q, k, v, mask, scale)

    patch.setattr(attend, "attention_with_lse", everything)


def window_one_token_too_wide(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        Window, "start", lambda window, t: (t - window.size) // window.chunk * window.chunk
    )


def a_token_that_is_read_twice(patch: pytest.MonkeyPatch) -> None:
    """Sinks are read beside the window, those that stand in it too."""
    real = attend.attend_window

    def twice(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sinks: tuple[Tensor, Tensor],
        window: Window,
        *rest: Any,
        lse: bool,
    ) -> attend.Read:
        first, scale = rest
        sinkless = real(q, k, v, sinks, window._replace(sinks=0), first, scale, lse=True)
        beside = torch.ones(q.shape[1], window.sinks, dtype=torch.bool).tril()
        return attend.both(
            sinkless, attend.attend_masked(q, *sinks, beside, scale, lse=True), lse=lse
        )

    patch.setattr(attend, "attend_window", twice)


def no_sinks(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Window, "sees", lambda window, t, s: (s >= 0) & (s <= t) & (s >= window.start(t)))


def a_gap_between_window_and_chunks(patch: pytest.MonkeyPatch) -> None:
    """The window is exactly as wide as it is said, and up to c - 1 tokens are nowhere."""
    patch.setattr(MemoryKeyedAttention, "window_begins", 1)


def a_bias_that_leaks_to_another_head(patch: pytest.MonkeyPatch) -> None:
    real = Router.biases
    patch.setattr(Router, "biases", lambda router, q: real(router, q).roll(1, 2))


def a_log_sum_exp_without_gradient(patch: pytest.MonkeyPatch) -> None:
    real = fused.attention_with_lse

    def half(*inputs: Any) -> tuple[Tensor, Tensor]:
        o, lse = real(*inputs)
        return o, lse.detach()

    patch.setattr(attend, "attention_with_lse", half)


def chunks_whose_log_sum_exp_has_no_gradient(patch: pytest.MonkeyPatch) -> None:
    real = longterm.chunk_attention

    def half(*inputs: Any) -> tuple[Tensor, Tensor]:
        o, lse = real(*inputs)
        return o, lse.detach()

    patch.setattr(longterm, "chunk_attention", half)
    patch.setattr(longterm, "GATHERED_PAIRS", 0)
    patch.setattr(longterm, "GATHERED_PAIRS_PER_CHUNK", 0)


def candidates(patch: pytest.MonkeyPatch, rule: Callable[[Tensor, int], Tensor]) -> None:
    patch.setattr(Limits, "end", lambda limits, t: rule(t, limits.chunk_size) + limits.banked)

    def reach(limits: Limits, context: int) -> int:
        return int(rule(torch.tensor(context - 1), limits.chunk_size)) + limits.banked

    patch.setattr(Limits, "reach", reach)


def chunks_not_yet_completed(patch: pytest.MonkeyPatch) -> None:
    candidates(patch, lambda t, chunk_size: t // chunk_size + 1)


def chunks_inside_the_window(patch: pytest.MonkeyPatch) -> None:
    candidates(patch, lambda t, chunk_size: (t + 1) // chunk_size)


def padding_counts(patch: pytest.MonkeyPatch) -> None:
    in_place = torch.arange(TOKENS)
    patch.setattr(
        "mka.attention.base.packing", lambda valid: Packing(in_place.expand(valid.shape), valid)
    )


def no_mask_in_the_router(patch: pytest.MonkeyPatch) -> None:
    real = Router.weights
    patch.setattr(
        Router, "weights", lambda router, q, exists: real(router, q, torch.ones_like(exists))
    )


def ties_to_the_later_chunk(patch: pytest.MonkeyPatch, later_wins: bool = True) -> None:
    for kind in MEMORY:
        patch.setattr(
            f"mka.attention.{kind}.retrieve",
            partial(checks_memory.brute_force, later_wins=later_wins),
        )


def every_slot_is_read(patch: pytest.MonkeyPatch) -> None:
    real = session.attend_slots
    patch.setattr(
        "mka.attention.mka.attend_slots",
        lambda q, k, v, stride, _, *rest, lse: real(q, k, v, stride, None, *rest, lse=lse),
    )


def infinities_reach_the_attention(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("mka.attention.base.bounded", lambda x: x)


def chunks_merged_without_their_sums(patch: pytest.MonkeyPatch) -> None:
    """Every retrieved chunk weighs the same, whatever its scores."""

    def mean_of_chunks(meeting: Meeting, *rest: Any, **options: Any) -> attend.Read:
        parts = [
            real(
                meeting._replace(
                    retrieved=Retrieved(*(x[..., i, None] for x in meeting.retrieved))
                ),
                *rest,
                **options,
            )
            for i in range(meeting.retrieved.chunk.shape[3])
        ]
        read = real(meeting, *rest, **options)
        return read._replace(values=torch.stack([part.values for part in parts]).mean(0))

    real = held.attend_held
    patch.setattr("mka.attention.mka.attend_held", mean_of_chunks)


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
    (no_mask_in_the_router, ("fmka",), "small", (naive_parity,)),
    (no_mask_in_the_router, ("mka",), "routed", (naive_parity,)),
    (a_token_that_is_read_twice, ALL, "small", (naive_parity,)),
    (no_sinks, ALL, "small", (naive_parity,)),
    (a_gap_between_window_and_chunks, ("mka",), "small", (naive_parity,)),
    (a_bias_that_leaks_to_another_head, ("mka",), "small", (naive_parity,)),
    (a_log_sum_exp_without_gradient, ("mka",), "small", (naive_parity,)),
    (chunks_whose_log_sum_exp_has_no_gradient, ("mka",), "small", (naive_parity,)),
    (every_slot_is_read, ("mka",), "small", (naive_parity,)),
    (chunks_merged_without_their_sums, ("mka",), "small", (naive_parity,)),
    (infinities_reach_the_attention, ("mha", "mla", *MEMORY), "no-window", (largest_values,)),
]
EACH = [
    pytest.param(
        plant, kind, variant, check, id=f"{plant.__name__}-{kind}-{variant}-{check.__name__}"
    )
    for plant, kinds, variant, turned_red in DEFECTS
    for kind in kinds
    for check in turned_red
]


@pytest.mark.parametrize(("plant", "kind", "variant", "check"), EACH)
def test_the_contract_turns_red(
    plant: Plant,
    kind: str,
    variant: str,
    check: Callable[[Any], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attn = checks.make(kind, variant)
    check(attn)
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check(attn)


def with_every_score_tied(kind: str) -> Any:
    """Summary keys of zero: every score is zero exactly, while the chunks' contents differ."""
    attn = checks.make(kind, "routed" if kind == "mka" else "small")
    torch.nn.init.zeros_(
        attn.get_parameter({"mka": "k_proj.weight", "fmka": "index_k_proj.weight"}[kind])
    )
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
        checks_memory.assert_earlier_chunk_wins_ties(
            partial(checks_memory.brute_force, later_wins=True)
        )


@pytest.mark.parametrize("plant", [chunks_not_yet_completed, chunks_inside_the_window])
def test_wrong_candidates_turn_retrieval_red(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> None:
        x = checks.rows(1, TOKENS).unsqueeze(2)
        retrieved = retrieve(x, longterm.chunk_means(x, 3), Limits(3, 5, 2))
        checks_memory.assert_only_completed_chunks_outside_the_window(retrieved, 3, 5)

    check()
    plant(monkeypatch)
    with pytest.raises(AssertionError):
        check()
