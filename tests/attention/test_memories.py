"""What the memories of mka and fmka add to a window: each level reaches tokens that the window
cannot."""

from typing import Any

import pytest
import torch

import checks
from mka.attention import (
    CausalAttention,
    FastMemoryKeyedAttention,
    MemoryKeyedAttention,
    build_attention,
)
from mka.memory.longterm import chunk_means
from mka.memory.search import AsRead, Limits, retrieve, retrieve_as_read
from mka.ops.rotary import RotaryEmbedding

WINDOW, CHUNK, TOKENS, PLANTED = 8, 4, 40, 1
every_memory_kind = pytest.mark.parametrize("kind", ["mka", "fmka"])


def build(kind: str, dtype: torch.dtype = torch.float64, **changes: Any) -> CausalAttention:
    options = {
        "local_window": WINDOW,
        "chunk_size": CHUNK,
        "top_k": 20,
        "session_decay": None,
        "session_stride": 1,
    }
    options["sink_tokens"] = 0
    return checks.make(kind, "small", dtype, **options | changes)


def reached(attn: CausalAttention, t: int = TOKENS - 1) -> torch.Tensor:
    """(T,) bool: the tokens that the output at t depends on."""
    x = checks.rows(1, TOKENS).requires_grad_()
    (grad,) = torch.autograd.grad(attn(x)[0][0, t].sum(), x)
    return (grad[0] != 0).any(-1)


@every_memory_kind
def test_with_the_window_alone_a_distant_token_is_out_of_reach(kind: str) -> None:
    tokens = reached(build(kind, top_k=0))
    assert tokens.nonzero().flatten().tolist() == list(range(TOKENS - WINDOW, TOKENS))


@every_memory_kind
@pytest.mark.parametrize("level", [{"top_k": 20}, {"top_k": 0, "session_decay": 0.9}])
def test_each_memory_level_reaches_it(kind: str, level: dict[str, Any]) -> None:
    attn = build(kind, **level)
    assert reached(attn)[PLANTED]
    x = checks.rows(1, TOKENS)
    changed = x.clone()
    changed[:, PLANTED] += 1
    effect = (attn(changed)[0] - attn(x)[0]).abs()[0, -1].max()
    assert effect > 1e3 * checks.TOLERANCE[torch.float64]


def test_one_retrieved_chunk_is_the_one_whose_key_answers_the_query() -> None:
    """A key planted far behind the window is found by the query that asks for it, and by no other
    group."""
    limits = Limits(CHUNK, WINDOW, 1)
    q, k = torch.zeros(1, TOKENS, 4, 4), torch.zeros(1, TOKENS, 2, 4)
    q[0, -1] = 1.0
    k[0, 2 * CHUNK : 3 * CHUNK, 0] = 1.0
    k[0, 5 * CHUNK : 6 * CHUNK, 1] = 1.0
    routed = build("mka", mix="routed", num_kv_heads=2)
    assert isinstance(routed, MemoryKeyedAttention)
    means = chunk_means(k, CHUNK)
    for found in (
        retrieve(routed.index_queries(q), means, limits),
        retrieve_as_read(AsRead(q, means), None, None, limits),
    ):
        assert found.chunk[0, -1].flatten().tolist() == [2, 5]


@pytest.mark.parametrize("proposed", [1, 2, 100])
@pytest.mark.parametrize("variant", ["small", "rotary", "far", "one chunk"])
def test_however_many_chunks_are_proposed(
    variant: str, proposed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the slow twin: with 1 the means choose, with 100 the keys choose among all candidates."""
    monkeypatch.setattr("mka.attention.mka.PROPOSED", proposed)
    attn, x = checks.make("mka", variant), checks.rows(2, 40)
    checks.assert_equals_naive(attn, x)
    with torch.no_grad():
        state, y = attn.initial_state(2), attn(x)[0]
        parts = [attn(part, state=state)[0] for part in x.split([13, 1, 1, 25], dim=1)]
        checks.close(torch.cat(parts, 1), y)


@torch.no_grad()
def test_in_bfloat16_the_choice_of_chunks_does_not_depend_on_the_future() -> None:
    """Whether neighbors read together is decided for the whole row: here by what follows, alike or
    unlike."""
    generator = torch.Generator().manual_seed(3)

    def smooth(tokens: int, width: int) -> torch.Tensor:
        x = torch.randn(1, tokens + width - 1, 64, generator=generator).unfold(1, width, 1).sum(-1)
        return torch.nn.functional.layer_norm(x, (64,)).bfloat16()

    memories = {"num_kv_heads": 2, "local_window": 32, "chunk_size": 4, "top_k": 4}
    attn = build_attention(
        "mka", hidden_size=64, num_heads=4, rotary=RotaryEmbedding(16), **memories
    )
    for parameter in attn.parameters():
        torch.nn.init.normal_(parameter, std=0.15, generator=generator)
    attn, past = attn.bfloat16(), smooth(512, 8)
    one, other = (
        attn(torch.cat([past, smooth(1536, width)], 1))[0][:, :512].float() for width in (200, 1)
    )
    assert (one - other).abs().max() <= 1e-2 * one.abs().max()


@pytest.mark.parametrize("kind", ["mka", "fmka"])
def test_the_first_token_with_a_candidate_is_the_first_to_reach_past_the_window(kind: str) -> None:
    attn, first = build(kind, mix="routed"), WINDOW + CHUNK - 1
    assert not reached(attn, first - 1)[: first - WINDOW].any()
    assert reached(attn, first)[:CHUNK].all()


@pytest.mark.parametrize(("window", "chunk_size", "sinks"), [(8, 4, 0), (8, 5, 4), (3, 16, 2)])
def test_no_token_falls_between_window_and_chunks(window: int, chunk_size: int, sinks: int) -> None:
    """With every chunk retrieved, joint mka reaches every token from every token."""
    attn = build("mka", local_window=window, chunk_size=chunk_size, sink_tokens=sinks)
    for t in range(TOKENS):
        assert reached(attn, t)[: t + 1].all()


def test_without_a_window_mka_has_no_long_term_level_and_fmka_has() -> None:
    mka, fmka = (build(kind, local_window=None) for kind in ("mka", "fmka"))
    assert isinstance(mka, MemoryKeyedAttention)
    assert isinstance(fmka, FastMemoryKeyedAttention)
    assert mka.num_candidates(TOKENS) == 0
    assert fmka.num_candidates(TOKENS) == TOKENS // CHUNK


def test_fused_keys_are_final_when_written() -> None:
    """What fmka would cache for a token does not depend on how many tokens follow."""
    attn, x = build("fmka", session_decay=0.9), checks.rows(1, TOKENS)
    assert isinstance(attn, FastMemoryKeyedAttention)

    def fused(tokens: int) -> torch.Tensor:
        part = x[:, :tokens]
        q = attn.queries(part)
        t = torch.arange(tokens)[None]
        return attn.fuse(part, attn.weights_at(q, t, 0, None), None)

    for tokens in (1, CHUNK, WINDOW + CHUNK, TOKENS - 1):
        checks.close(fused(tokens), fused(TOKENS)[:, :tokens])


@pytest.mark.parametrize("stride", [11, 16, 40, 41])
def test_session_slots_are_averages_at_every_stride_th_token(stride: int) -> None:
    attn = build("mka", top_k=0, session_decay=0.9, session_stride=stride)
    first_slot = stride - 1
    for t in (first_slot - 1, first_slot):
        if t < TOKENS:
            assert reached(attn, t)[0] == (t >= first_slot)
