"""Candidate search: sign codes and graphs against the exact order."""

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

import checks
from checks import close
from mka.config import InputError, LongTermConfig
from mka.memory import search
from mka.memory.longterm import num_candidates, retrieve
from mka.memory.places import LongTerm
from mka.memory.search import FaissIndex, decoded, ordered, projection, retrieve_lsh, sign_codes

LIMITS: dict[str, Any] = {"chunk_size": 3, "window": 4, "top_k": 3}


def case(chunks: int = 40, tokens: int = 123, groups: int = 2, width: int = 8) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(chunks)
    queries = torch.randn(2, tokens, groups, width, generator=generator, dtype=torch.float64)
    summaries = torch.randn(2, chunks, groups, width, generator=generator, dtype=torch.float64)
    return queries, summaries, num_candidates(torch.arange(tokens)[None], 3, 4)


@pytest.mark.parametrize("reranked", [40, 1000])
@pytest.mark.parametrize("tile_bytes", [1, 2**26])
def test_lsh_with_every_code_probed_is_exact(reranked: int, tile_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "TILE_BYTES", tile_bytes)
    queries, summaries, candidates = case()
    found = retrieve_lsh(queries, summaries, sign_codes(summaries, summaries), candidates, 3, reranked=reranked)
    exact = retrieve(queries, summaries, **LIMITS)
    assert torch.equal(found.found, exact.found)
    assert torch.equal(found.chunk, exact.chunk)


def test_the_earlier_chunk_wins_a_tie() -> None:
    queries, summaries, candidates = case()
    summaries[:] = summaries[:, :1]
    found = retrieve_lsh(queries, summaries, sign_codes(summaries, summaries), candidates, 3)
    assert torch.equal(found.chunk[:, -1], torch.arange(3).expand(2, 2, 3))


def test_lsh_finds_what_is_alike() -> None:
    generator = torch.Generator().manual_seed(3)
    summaries = torch.randn(1, 4096, 1, 64, generator=generator)
    asked = torch.arange(0, 4096, 64)
    queries = summaries[:, asked] + 0.3 * torch.randn(1, 64, 1, 64, generator=generator)
    found = retrieve_lsh(queries, summaries, sign_codes(summaries, summaries), torch.full((1, 64), 4096), 1)
    assert torch.equal(found.chunk.flatten(), asked)


def test_no_chunk_beyond_the_candidates() -> None:
    queries, summaries, candidates = case()
    for reranked in (3, 7, 40):
        chunk, found = retrieve_lsh(
            queries, summaries, sign_codes(summaries, summaries), candidates, 3, reranked=reranked
        )
        assert (chunk < candidates[..., None, None]).logical_or(~found).all()
        assert torch.equal(found.sum(-1), candidates.clamp(max=3)[..., None].expand(2, -1, 2))


def test_codes_are_the_same_whoever_stands_beside() -> None:
    _, summaries, _ = case()
    codes = sign_codes(summaries, summaries)
    assert codes.shape == (2, 40, 2, 3)
    assert torch.equal(codes[1:, 5], sign_codes(summaries[1:, 5:6], summaries[1:])[:, 0])


def test_a_code_is_signs_and_a_length() -> None:
    """By hand: two chunks around their mean, the second three times as far from it as it was before."""
    first = torch.tensor([3.0, 4.0]).expand(16, 2)
    summaries = torch.cat([first, first[:1] + torch.tensor([[2.0, 0.0]]), first[:1]])[None, :, None]
    code = decoded(sign_codes(summaries, summaries), torch.float64)[0, :, 0]
    signs = torch.where(torch.tensor([2.0, 0.0], dtype=torch.float64) @ projection(2) > 0, 2.0, -2.0)
    close(code[16, : signs.numel()], signs.to(code))
    assert code[17].abs().max() < 2**-15  # at the centre


@pytest.mark.parametrize("width", [1, 3, 8, 32])
def test_what_a_code_promises_is_near_the_product(width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    rows = projection(width)
    close(rows[:, :width].T @ rows[:, :width], torch.eye(width, dtype=torch.float64))
    s = torch.randn(1, 300, 1, width, generator=generator, dtype=torch.float64) * 5
    s[:, :16] -= s[:, :16].mean(1, keepdim=True)
    q = torch.randn(width, generator=generator, dtype=torch.float64)
    promised = decoded(sign_codes(s, s), torch.float64)[0, 16:, 0, : rows.shape[1]] @ (q @ rows)
    assert torch.corrcoef(torch.stack([promised, s[0, 16:, 0] @ q]))[0, 1] > 0.8


def test_floats_as_whole_numbers_keep_their_order() -> None:
    x = torch.tensor([-torch.inf, -3.5, -1e-30, -0.0, 0.0, 1e-30, 2.0, torch.inf])
    numbers = ordered(x)
    assert (numbers.diff() >= 0).all()
    assert torch.equal(numbers.diff() == 0, x.diff().nan_to_num(1) == 0)


def test_among_equal_promises_the_earlier_chunks_are_reranked() -> None:
    generator = torch.Generator().manual_seed(5)
    summaries = torch.randn(1, 64, 1, 8, generator=generator)
    summaries[:, 20:] = 50 * summaries[:, 20:21]
    queries = summaries[:, 20:21]
    found = retrieve_lsh(queries, summaries, sign_codes(summaries, summaries), torch.tensor([[64]]), 2, reranked=18)
    assert found.chunk.flatten().tolist() == [20, 21]


def test_faiss_finds_what_exact_finds_among_few() -> None:
    queries, summaries, candidates = case()
    found = FaissIndex().retrieve(queries, summaries, candidates, 3)
    exact = retrieve(queries, summaries, **LIMITS)
    assert torch.equal(found.chunk, exact.chunk)
    assert torch.equal(found.found, exact.found)


def test_faiss_with_fewer_chunks_than_its_centre_takes() -> None:
    queries, summaries, candidates = case(11, 36)
    found = FaissIndex().retrieve(queries, summaries, candidates, 3)
    exact = retrieve(queries, summaries, **LIMITS)
    assert torch.equal(found.chunk, exact.chunk)


def test_without_faiss_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(InputError, match=r"pip install 'mka\[faiss\]'; allowed without it: exact, lsh"):
        FaissIndex()


@pytest.mark.parametrize("kind", ["mka", "fmka"])
def test_a_state_searched_by_codes_that_probe_few(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few are re-ranked: not what the exact search finds, but the same in one call as token by token."""
    monkeypatch.setattr(search, "CENTRE_CHUNKS", 2)
    monkeypatch.setattr(search, "RERANKED_LEAST", 2)
    attn, x = checks.make(kind), checks.rows(2, 60)
    longterm = LongTerm.of(LongTermConfig(longterm_search="lsh"))
    with torch.no_grad():
        whole, _ = attn(x, state=attn.initial_state(2, longterm=longterm))
        state, parts = attn.initial_state(2, longterm=longterm), []
        for t in range(60):
            parts.append(attn(x[:, t : t + 1], state=state)[0])
    close(torch.cat(parts, 1), whole)
