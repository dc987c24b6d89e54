"""How the best chunks of a state are found: every summary (exact), by sign codes first (lsh), or by a graph (faiss).

    exact   q . s for every candidate
    lsh     |s - m| times (q P) . sign((s - m) P) for every candidate, the best 1/40 re-ranked by q . s
            P: random rotations, m: mean of the first 16 chunks                        (Charikar, STOC 2002; see below)
    faiss   an HNSW graph over s - m; what it proposes is re-ranked by q . s               (arXiv 1603.09320)

All three compare before any rotary embedding, in float32 or better, and the earlier chunk wins a tie.

Keys of trained models lie in a narrow cone, so signs of the keys themselves hardly differ, nor do their neighbours in a
graph by inner products: both are about a centre.
A centre takes the same from every chunk's score and so changes no order, as long as it does not change itself; that is
why it is the mean of the first chunks, which are always re-ranked and need no code. The query keeps its numbers (only
what is stored must be small), and a byte holds the length that signs do not see.
"""

import importlib
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mka.config import InputError
from mka.memory.entry import Entry
from mka.memory.longterm import Retrieved, num_candidates, retrieve, top_by_place
from mka.memory.state import State
from mka.ops.precision import no_autocast, upcast

CODE = "code"
BITS_PER_NUMBER = 2
"""Bits of a code for each number of a summary: with the byte of the length about a fourteenth of its float32 bytes."""
CENTRE_CHUNKS = 16
RERANKED_SHARE, RERANKED_LEAST = 40, 16
"""lsh re-ranks one candidate of so many, and this many for each chunk wanted at least."""
LENGTH_STEPS, LENGTH_OF_ONE = 8, 128
"""The byte of a length: steps for each doubling, and the byte that stands for 1."""
TILE_BYTES = 2**26
NEIGHBOURS, PROPOSED = 32, 64
"""faiss: links of the graph, and candidates it proposes for each chunk wanted."""


class Limits(NamedTuple):
    """chunk_size c, window w (0: every completed chunk is a candidate), top_k K."""

    chunk_size: int
    window: int
    top_k: int


def code_entry(groups: int, width: int, chunk_size: int) -> Entry:
    return Entry((groups, code_bytes(width)), torch.uint8, every=chunk_size)


def code_bytes(width: int) -> int:
    return -(-BITS_PER_NUMBER * width // 8) + 1


@cache
def projection(width: int) -> Tensor:
    """P (E, bits): columns of random rotations, as many as the bits of a code need; the same at every call."""
    bits, generator = 8 * (code_bytes(width) - 1), torch.Generator().manual_seed(0)
    rotations = [
        torch.linalg.qr(torch.randn(width, width, generator=generator, dtype=torch.float64))[0]
        for _ in range(-(-bits // width))
    ]
    return torch.cat(rotations, dim=1)[:, :bits]


def sign_codes(x: Tensor, summaries: Tensor) -> Tensor:
    """x (B or ..., N, G, E) -> (..., N, G, E / 4 + 1) uint8: signs of (x - m) P, eight to a byte, and its length.

    m is the mean of the first 16 of `summaries` (..., J, G, E); the codes of those 16 themselves are not used.
    """
    with no_autocast(x):
        centre = summaries[..., :CENTRE_CHUNKS, :, :].double().mean(-3, keepdim=True)
        x = x.double() - centre
        signs = x @ projection(x.shape[-1]).to(x) > 0
        places = 2 ** torch.arange(8, device=x.device)
        length = (LENGTH_STEPS * x.norm(dim=-1, keepdim=True).log2() + LENGTH_OF_ONE).round()
        packed = (signs.unflatten(-1, (-1, 8)) * places).sum(-1)
        return torch.cat([packed, length.nan_to_num().clamp(0, 255).long()], dim=-1).to(torch.uint8)


def decoded(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """(..., W) uint8 -> (..., 8 (W - 1)): the signs, +1 or -1, times the length."""
    places = torch.arange(8, device=codes.device, dtype=torch.uint8)
    signs = ((codes[..., :-1, None] >> places) & 1).flatten(-2).to(dtype).mul_(2).sub_(1)
    return signs * 2 ** ((codes[..., -1:].to(dtype) - LENGTH_OF_ONE) / LENGTH_STEPS)


def ordered(x: Tensor) -> Tensor:
    """float32 -> int64 in the same order, between -2^31 and 2^31."""
    bits = x.float().view(torch.int32).long()
    return torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)


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
        state.index = state.index or FaissIndex(state.banked)
        return state.index.retrieve(queries, summaries, candidates, limits.top_k)
    return retrieve(queries, summaries, t, banked=state.banked, **limits._asdict())


@torch.no_grad()
def retrieve_lsh(
    queries: Tensor, summaries: Tensor, codes: Tensor, candidates: Tensor, top_k: int, reranked: int | None = None
) -> Retrieved:
    """Of the candidates, those (`reranked` of them) whose codes promise most, ranked exactly.

    queries (B, T, G, E), summaries (B, J, G, E), codes (B, J, G, W); the first `candidates` (B or 1, T) are candidates.
    With `reranked` at J or more this is the exact search. None: as many as a query's own candidates say, so that what
    comes later, or stands in a longer row, changes nothing.
    """
    with no_autocast(queries):
        queries = upcast(queries)
        projected = (queries @ projection(queries.shape[-1]).to(queries)).transpose(1, 2)  # (B, G, T, bits)
        promises = decoded(codes, queries.dtype).permute(0, 2, 3, 1)  # (B, G, bits, J)
        chunks = summaries.shape[1]
        column = torch.arange(chunks, device=queries.device)
        least = RERANKED_LEAST * top_k
        most = min(chunks, reranked or max(least, chunks // RERANKED_SHARE))
        asked = candidates.new_full((), most) if reranked else (candidates // RERANKED_SHARE).clamp(min=least)
        rank = torch.arange(most, device=queries.device)
        bytes_of_query = queries.shape[0] * queries.shape[2] * (24 * chunks + 4 * most * queries.shape[3])
        step = max(1, TILE_BYTES // max(1, bytes_of_query))
        found = []
        for start in range(0, queries.shape[1], step):
            tile = slice(start, start + step)
            promised = (projected[:, :, tile] @ promises).transpose(1, 2)  # (B, T, G, J)
            promised[..., :CENTRE_CHUNKS] = torch.inf
            promised.masked_fill_(column >= candidates[:, tile, None, None], -torch.inf)
            unique = ordered(promised) * chunks - column
            nearest = -unique.topk(most).values % max(1, chunks)  # the most promising first
            beyond = rank >= asked.expand(candidates.shape)[:, tile, None, None]
            nearest.masked_fill_(beyond, -1)
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

    What a graph proposes hangs on everything in it, and on how it came in: before a query asks, its own candidates are
    put in and no later chunk, one at a time, as in decoding. Rows that were taken back or chosen anew start another
    index: what is in a graph cannot be taken out.
    """

    def __init__(self, banked: int = 0) -> None:
        try:
            self.faiss = importlib.import_module("faiss")
        except ImportError:
            raise InputError(
                "longterm_search is 'faiss', which is not installed: pip install 'mka[faiss]'; allowed without it: "
                "exact, lsh"
            ) from None
        self.banked = banked
        self.graphs: dict[tuple[int, int], Any] = {}
        self.compared = 0

    def retrieve(self, queries: Tensor, summaries: Tensor, candidates: Tensor, top_k: int) -> Retrieved:
        """As `retrieve_lsh`. `compared` counts the summaries that were looked at."""
        queries = upcast(queries)
        batch, tokens, groups, _ = queries.shape
        candidates = candidates.expand(batch, tokens)
        proposed = torch.full((batch, tokens, groups, CENTRE_CHUNKS + PROPOSED * top_k), -1, device=queries.device)
        for row in range(batch):
            for group in range(groups):
                for count in candidates[row].unique().tolist():  # the smallest first
                    self.update(row, group, summaries[row, :count, group])
                    asked = candidates[row] == count
                    answer = self.ask(row, group, queries[row, asked, group], count, PROPOSED * top_k)
                    proposed[row, asked, group] = answer.to(queries.device)
        return rerank(queries, summaries, proposed, candidates, top_k)

    def update(self, row: int, group: int, summaries: Tensor) -> None:
        """Have the graph hold these chunks but the first 16, about the mean of those; a bank's come in at once."""
        if len(summaries) <= CENTRE_CHUNKS:
            return
        graph = self.graphs.get((row, group))
        if graph is None:
            graph = self.faiss.IndexHNSWFlat(summaries.shape[-1], NEIGHBOURS, self.faiss.METRIC_INNER_PRODUCT)
            self.graphs[row, group] = graph
        fresh = summaries[CENTRE_CHUNKS + graph.ntotal :].double() - summaries[:CENTRE_CHUNKS].double().mean(0)
        together = max(0, self.banked - CENTRE_CHUNKS - graph.ntotal)
        for part in (fresh[:together], *fresh[together:].split(1)):
            if len(part):
                graph.add(part.detach().float().cpu().numpy())

    def ask(self, row: int, group: int, queries: Tensor, count: int, wanted: int) -> Tensor:
        """(N, 16 + wanted): the first chunks and those that the graph proposes of `count`, -1 where there are fewer."""
        first = torch.arange(CENTRE_CHUNKS)
        first = first.where(first < count, -1).expand(len(queries), -1)
        if count <= CENTRE_CHUNKS:
            return torch.cat([first, torch.full((len(queries), wanted), -1)], dim=1)
        self.faiss.cvar.hnsw_stats.reset()
        limits = self.faiss.SearchParametersHNSW(efSearch=wanted)
        _, chunks = self.graphs[row, group].search(queries.detach().float().cpu().numpy(), wanted, params=limits)
        self.compared += self.faiss.cvar.hnsw_stats.ndis
        proposed = torch.from_numpy(chunks)
        return torch.cat([first, proposed.where(proposed < 0, proposed + CENTRE_CHUNKS)], dim=1)
