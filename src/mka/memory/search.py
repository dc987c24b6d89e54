"""How the best chunks of a state are found: every summary (exact), by sign codes first (lsh), or by a graph (faiss).

    exact   q . s for every candidate
    lsh     bits of sign(s P) for every candidate, the nearest 1/32 re-ranked by q . s     (Charikar, STOC 2002)
    faiss   an HNSW graph over the summaries; what it proposes is re-ranked by q . s       (arXiv 1603.09320)

All three compare before any rotary embedding, in float32 or better, and the earlier chunk wins a tie.
"""

import importlib
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mka.config import InputError
from mka.memory.longterm import Retrieved, num_candidates, retrieve, top_by_place
from mka.memory.state import Entry, State
from mka.ops.precision import no_autocast, upcast

CODE = "code"
BITS_PER_NUMBER = 2
"""Bits of a code for each number of a summary: a sixteenth of its float32 bytes."""
RERANKED_SHARE, RERANKED_LEAST = 32, 16
"""lsh re-ranks one candidate of so many, and this many for each chunk wanted at least."""
TILE_BYTES = 2**26
NEIGHBOURS, PROPOSED = 32, 64
"""faiss: links of the graph, and candidates it proposes for each chunk wanted."""


class Limits(NamedTuple):
    """chunk_size c, window w (0: every completed chunk is a candidate), top_k K."""

    chunk_size: int
    window: int
    top_k: int


def code_entry(groups: int, width: int, chunk_size: int) -> Entry:
    return Entry((groups, -(-BITS_PER_NUMBER * width // 8)), torch.uint8, every=chunk_size)


@cache
def projection(width: int, bits: int) -> Tensor:
    return torch.randn(width, bits, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def sign_codes(x: Tensor) -> Tensor:
    """x (..., E) -> (..., E / 4) uint8: 2 E signs of random projections, eight to a byte; the same at every call."""
    with no_autocast(x):
        bits = -(-BITS_PER_NUMBER * x.shape[-1] // 8) * 8
        signs = upcast(x) @ projection(x.shape[-1], bits).to(upcast(x)) > 0
        places = 2 ** torch.arange(8, device=x.device)
        return (signs.unflatten(-1, (-1, 8)) * places).sum(-1).to(torch.uint8)


def hamming(a: Tensor, b: Tensor) -> Tensor:
    """Differing bits of codes that broadcast, (..., W) uint8 -> (...) int64."""
    if a.device.type == "cpu":
        word = next(kind for kind in (np.uint64, np.uint32, np.uint16, np.uint8) if a.shape[-1] % kind().itemsize == 0)
        words = (np.ascontiguousarray(x.numpy()).view(word) for x in (a, b))
        return torch.from_numpy(np.bitwise_count(np.bitwise_xor(*words)).sum(-1, dtype=np.int64))
    table = torch.tensor([number.bit_count() for number in range(256)], device=a.device)
    return table[(a ^ b).long()].sum(-1)


def search(queries: Tensor, state: State, name: str, t: Tensor, limits: Limits) -> Retrieved:
    """The best K of the summaries that the state keeps under `name`, a bank's included, as it is to be searched.

    queries (B, T, G, E) before any rotary embedding, t (B or 1, T) their token indices. The summaries are the state's
    entries, (G, E) or for one group (E,) each.
    """
    summaries = state.all(name)
    if summaries.dim() == 3:
        summaries = summaries.unsqueeze(2)
    if not state.is_even:  # what stands after a row's last token is padding: it finds no chunk that is not there
        t = torch.minimum(t, torch.tensor(state.lengths, device=t.device)[:, None] - 1)
    candidates = num_candidates(t, limits.chunk_size, limits.window) + state.banked
    kind = state.longterm.config.longterm_search
    if kind == "lsh":
        return retrieve_lsh(queries, summaries, state.all(CODE), candidates, limits.top_k)
    if kind == "faiss":
        state.index = state.index or FaissIndex()
        return state.index.retrieve(queries, summaries, candidates, limits.top_k, max(state.lengths))
    return retrieve(queries, summaries, t, banked=state.banked, **limits._asdict())


@torch.no_grad()
def retrieve_lsh(
    queries: Tensor, summaries: Tensor, codes: Tensor, candidates: Tensor, top_k: int, reranked: int | None = None
) -> Retrieved:
    """Of the candidates, those (`reranked` of them) whose codes differ least from the query's, ranked exactly.

    queries (B, T, G, E), summaries (B, J, G, E), codes (B, J, G, W); the first `candidates` (B or 1, T) are candidates.
    With `reranked` at J or more this is the exact search.
    """
    with no_autocast(queries):
        queries, codes_of_queries = upcast(queries), sign_codes(queries)
        chunks = summaries.shape[1]
        column = torch.arange(chunks, device=queries.device)
        reranked = min(chunks, reranked or max(RERANKED_LEAST * top_k, chunks // RERANKED_SHARE))
        bytes_of_query = queries.shape[0] * queries.shape[2] * (8 * chunks + 4 * reranked * queries.shape[3])
        step = max(1, TILE_BYTES // max(1, bytes_of_query))
        found = []
        for start in range(0, queries.shape[1], step):
            tile = slice(start, start + step)
            distance = hamming(codes_of_queries[:, tile, None], codes[:, None]).transpose(2, 3)  # (B, T, G, J)
            distance = distance.masked_fill(column >= candidates[:, tile, None, None], 8 * codes.shape[-1] + 1)
            nearest = (distance * chunks + column).topk(reranked, largest=False, sorted=False).values % max(1, chunks)
            found.append(rerank(queries[:, tile], summaries, nearest, candidates[:, tile], top_k))
    return Retrieved(*(torch.cat(parts, dim=1) for parts in zip(*found, strict=True)))


def rerank(queries: Tensor, summaries: Tensor, proposed: Tensor, candidates: Tensor, top_k: int) -> Retrieved:
    """The best K of the chunks `proposed` (B, T, G, N) that are candidates; -1 proposes nothing."""
    proposed = proposed.sort(-1).values
    rows = torch.arange(len(summaries), device=queries.device).view(-1, 1, 1, 1)
    group = torch.arange(summaries.shape[2], device=queries.device).view(-1, 1)
    scores = (summaries[rows, proposed.clamp(min=0), group].to(queries.dtype) @ queries.unsqueeze(-1)).squeeze(-1)
    scores = scores.masked_fill((proposed < 0) | (proposed >= candidates[..., None, None]), -torch.inf)
    score, place = top_by_place(scores, top_k)
    found = score > -torch.inf
    return Retrieved(proposed.gather(-1, place).masked_fill(~found, 0), found)


class FaissIndex:
    """One graph for each row and group, over the summaries of a state; it is never written to a file.

    Rows that were taken back or chosen anew start another index: what is in a graph cannot be taken out.
    """

    def __init__(self) -> None:
        try:
            self.faiss = importlib.import_module("faiss")
        except ImportError:
            raise InputError(
                "longterm_search is 'faiss', which is not installed: pip install 'mka[faiss]'; allowed without it: "
                "exact, lsh"
            ) from None
        self.graphs: dict[tuple[int, int], Any] = {}
        self.compared = 0

    def retrieve(
        self, queries: Tensor, summaries: Tensor, candidates: Tensor, top_k: int, lengths: int = 0
    ) -> Retrieved:
        """As `retrieve_lsh`. `compared` counts the summaries that were looked at."""
        queries = upcast(queries)
        batch, tokens, groups, _ = queries.shape
        candidates = candidates.expand(batch, tokens)
        proposed = torch.full((batch, tokens, groups, PROPOSED * top_k), -1, device=queries.device)
        for row in range(batch):
            for group in range(groups):
                self.update(row, group, summaries[row, :, group])
                for count in candidates[row].unique().tolist():
                    asked = candidates[row] == count
                    answer = self.ask(row, group, queries[row, asked, group], count, proposed.shape[-1])
                    proposed[row, asked, group] = answer.to(queries.device)
        return rerank(queries, summaries, proposed, candidates, top_k)

    def update(self, row: int, group: int, summaries: Tensor) -> None:
        graph = self.graphs.get((row, group))
        if graph is None:
            graph = self.faiss.IndexHNSWFlat(summaries.shape[-1], NEIGHBOURS, self.faiss.METRIC_INNER_PRODUCT)
            self.graphs[row, group] = graph
        graph.add(summaries[graph.ntotal :].detach().float().cpu().numpy())

    def ask(self, row: int, group: int, queries: Tensor, count: int, wanted: int) -> Tensor:
        if not count:
            return torch.full((len(queries), wanted), -1)
        allowed = self.faiss.IDSelectorRange(0, count)
        limits = self.faiss.SearchParametersHNSW(sel=allowed, efSearch=wanted)
        self.faiss.cvar.hnsw_stats.reset()
        _, chunks = self.graphs[row, group].search(queries.detach().float().cpu().numpy(), wanted, params=limits)
        self.compared += self.faiss.cvar.hnsw_stats.ndis
        return torch.from_numpy(chunks)
