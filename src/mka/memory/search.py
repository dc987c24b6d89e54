"""How the best chunks are found: every candidate is scored, exactly, and the earlier chunk wins a tie.

    retrieve          q . s for each group, its queries summed, before any rotary embedding
    retrieve_as_read  the sum over a group's heads of softmax_j(q . s_j / sqrt(D)), over all candidates j, with queries
                      and mean keys as they will be read
    best_by_keys      of chunks proposed so, by what the heads would read in each: the share of its tokens in one
                      softmax with window and sinks

A softmax for each head lets one head that is sure outvote many that are not, which a sum of scores does not.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mka.ops.precision import no_autocast, upcast

QUERY_TILE, SUMMARY_TILE = 512, 4096
"""Queries and summaries scored at once: the scores take no more than that of each group, whatever T is."""
SCORES, SCORES_ON_GPU = 2**20, 2**26
"""Scores of all heads that are normalised at once: what a processor's cache holds, what keeps a GPU busy."""


class Retrieved(NamedTuple):
    """Both (B, T, G, K). chunk: which ones, best first or by place; found: False where there were fewer candidates."""

    chunk: Tensor
    found: Tensor

    def split(self, near: "Near") -> "tuple[Retrieved, Retrieved]":
        """Those that are near, and the others."""
        begins = near.begins.expand(len(self.chunk), -1).gather(1, self.chunk.flatten(1)).view_as(self.chunk)
        is_near = begins >= near.since[:, :, None, None]
        return Retrieved(self.chunk, self.found & is_near), Retrieved(self.chunk, self.found & ~is_near)


class Near(NamedTuple):
    """Which chunks a query meets where they stand: those that begin at `since` or later.

    since (B or 1, T), begins (B or 1, J).
    """

    since: Tensor
    begins: Tensor

    def all(self) -> Tensor:
        """(): whether every query meets every chunk so."""
        return (self.begins.amin(1) >= self.since.amax(1)).all()

    def marked(self, tile: slice, reach: int) -> Tensor:
        """(B or 1, t, J) bool, of a tile of queries and the first chunks."""
        return self.begins[:, None, :reach] >= self.since[:, tile, None]


def near_at(t: Tensor, begins: Tensor, limit: int | None, banked: int) -> Near | None:
    """Which chunks, beginning at (B or 1, J), queries at t (T,) or (B, T) meet where they stand: those that are at most
    `limit` away (None: any) and not among the first `banked`, of a bank. None: all of them."""
    if limit is None and not banked:
        return None
    t = t if t.dim() == 2 else t[None]
    nowhere = torch.iinfo(torch.int64).min
    if banked:
        column = torch.arange(begins.shape[1], device=begins.device)
        begins = begins.masked_fill(column < banked, nowhere)
    near = Near(torch.full_like(t, nowhere + 1) if limit is None else t - limit, begins)
    if torch.compiler.is_compiling() and not banked:
        check: Any = torch._assert_async  # pyright: ignore[reportPrivateImportUsage]
        check(near.all(), f"a row is longer than max_distance, {limit}; a compiled model reads no further")
        return None
    return None if bool(near.all()) else near


class Limits(NamedTuple):
    """Which chunks are candidates, and how many of them are taken.

    A chunk of the row is one where its last token lies before the window (`window` 0: where it is completed) and not
    all of its tokens are among the first `sinks`, which are read anyway. `banked` chunks of a bank come first.
    """

    chunk_size: int
    window: int
    top_k: int
    sinks: int = 0
    banked: int = 0

    def end(self, t: Tensor) -> Tensor:
        """One past the last candidate of the queries at t (0-based)."""
        return ((t + 1 - self.window) // self.chunk_size).clamp(min=0) + self.banked

    def reach(self, context: int) -> int:
        """The same for the last of `context` tokens."""
        return max(0, (context - self.window) // self.chunk_size) + self.banked

    @property
    def hidden(self) -> int:
        """Chunks of the row that are sinks alone."""
        return self.sinks // self.chunk_size

    def count(self, context: int) -> int:
        """Candidates of the last of `context` tokens."""
        own = max(0, self.reach(context) - self.banked - self.hidden)
        return own + self.banked if self.top_k else 0

    def hide(self, scores: Tensor, end: Tensor, sure: int = 0) -> None:
        """Put -inf where scores (..., J) are of no candidate; end broadcasts to (...), and is nowhere below `sure`."""
        column = torch.arange(sure, scores.shape[-1], device=scores.device)
        scores[..., sure:].masked_fill_(column >= end.unsqueeze(-1), -torch.inf)
        scores[..., self.banked : self.banked + self.hidden] = -torch.inf


class AsRead(NamedTuple):
    """Queries (B, T, H, D) and the mean keys (B, J, G, D) of chunks, as they meet when they are read."""

    queries: Tensor
    keys: Tensor


@torch.no_grad()
def retrieve(queries: Tensor, summaries: Tensor, limits: Limits, t: Tensor | None = None) -> Retrieved:
    """The K candidates with the largest inner product of query and summary.

    queries (B, T, G, E), summaries (B, J, G, E), both before any rotary embedding; t (B or 1, T) the token index of
    each query (None: 0, 1, ...).
    """
    tokens, tiles = queries.shape[1], []
    end = limits.end(torch.arange(tokens, device=queries.device)[None] if t is None else t)
    with no_autocast(queries):
        queries = upcast(queries).transpose(1, 2)
        summaries = summaries.to(queries.dtype).permute(0, 2, 3, 1)
        for tile in steps(tokens, QUERY_TILE):
            reach = summaries.shape[-1] if t is not None else limits.reach(tile.stop)
            tiles.append(best_chunks(queries[:, :, tile], summaries[..., :reach], end[:, None, tile], limits))
    return taken(tiles)


@torch.no_grad()
def retrieve_as_read(
    near: AsRead,
    far: AsRead | None,
    nearness: Near | None,
    limits: Limits,
    t: Tensor | None = None,
    *,
    by_place: bool = False,
) -> Retrieved:
    """The K candidates of which a group's heads would read most, by their mean keys.

    near: as all chunks meet queries, or those that `nearness` says; far: as the others do. by_place: the earlier
    chunk first, not the better one.
    """
    q, (chunks, groups) = near.queries, near.keys.shape[1:3]
    batch, tokens, heads, width = q.shape
    end = limits.end(torch.arange(tokens, device=q.device)[None] if t is None else t)
    tiles = []
    with no_autocast(q):
        scale = 1 / math.sqrt(width)
        pairs = [by_group(pair, groups, scale) for pair in (near, far) if pair is not None]
        at_once = SCORES_ON_GPU if q.is_cuda else SCORES
        for tile in steps(tokens, max(1, at_once // max(1, batch * heads * chunks))):
            reach = chunks if t is not None else limits.reach(tile.stop)
            sure = min(reach, surely(end, tile, limits, t))
            parts = [(queries[:, :, :, tile], keys[..., :reach]) for queries, keys in pairs]
            is_near = nearness.marked(tile, reach) if nearness is not None and len(parts) > 1 else None
            score = products(*parts[0]) if is_near is None else products_of_both(parts[0], parts[1], is_near)
            score = score.nan_to_num_()  # a huge finite query may overflow
            limits.hide(score, end[:, None, None, tile], sure)
            mass = score.softmax(-1).nan_to_num_().sum(2)
            limits.hide(mass, end[:, None, tile], sure)
            best = top_by_place(mass, limits.top_k, in_order=not by_place)
            tiles.append(kept(*best, limits.top_k))
    return taken(tiles)


@torch.no_grad()
def best_by_keys(proposed: Retrieved, sums: Tensor, window: Tensor, top_k: int) -> Retrieved:
    """The K of those proposed of which a group's heads would read most.

    proposed (B, T, G, N), the earlier chunk first; sums (B, T, G, N, R): the log-sum-exp of each head's scores in
    them, -inf where nothing was found; others (B, T, H): that of all else which the head reads.
    """
    total = torch.logaddexp(window.unflatten(2, sums.shape[2:5:2]), sums.logsumexp(3)).unsqueeze(3)
    share = (sums - total).nan_to_num_().logsumexp(-1)  # a huge finite query may overflow
    score, place = kept(*top_by_place(share.masked_fill_(~proposed.found, -torch.inf), top_k), top_k)
    found = score > -torch.inf
    return Retrieved(proposed.chunk.gather(3, place).masked_fill(~found, 0), found)


def surely(end: Tensor, tile: slice, limits: Limits, t: Tensor | None) -> int:
    """So many chunks come before the end of all of a tile's queries, or fewer: `end` (B or 1, T) is theirs at t."""
    if t is None:
        return limits.reach(tile.start + 1)
    if end.is_cuda or torch.compiler.is_compiling():  # asking a GPU would wait for it
        return 0
    return int(end[:, tile].min())


def by_group(pair: AsRead, groups: int, scale: float) -> tuple[Tensor, Tensor]:
    """Queries (B, G, R, T, D), scaled, and keys (B, G, D, J), both float32 or better."""
    q = upcast(pair.queries) * scale
    return q.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4), pair.keys.to(q.dtype).permute(0, 2, 3, 1)


def products(queries: Tensor, keys: Tensor) -> Tensor:
    """(B, G, R, t, J): the heads of a group are rows of one product, which reads its keys once."""
    return (queries.flatten(2, 3) @ keys).unflatten(2, queries.shape[2:4])


def products_of_both(near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor], is_near: Tensor) -> Tensor:
    """`products` of `near` where is_near (B or 1, t, J), and of `far` elsewhere.

    What is near stands at the end of most rows: only columns from the first near one on are multiplied as near, only
    those up to the last far one as far.
    """
    some, every = is_near.flatten(0, 1).any(0), is_near.flatten(0, 1).all(0)
    first, last = int((some.cumsum(0) == 0).sum()), len(every) - int(every.flip(0).cumprod(0).sum())
    score, own = products(far[0], far[1][..., :last]), products(near[0], near[1][..., first:])
    mixed = torch.where(is_near[:, None, None, :, first:last], own[..., : last - first], score[..., first:])
    return torch.cat([score[..., :first], mixed, own[..., last - first :]], dim=-1)


def steps(tokens: int, step: int) -> Iterator[slice]:
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def kept(score: Tensor, chunk: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Both (..., K): what is missing scores -inf."""
    missing = top_k - score.shape[-1]
    if not missing:
        return score, chunk
    scores, chunks = score.new_full((*score.shape[:-1], top_k), -torch.inf), chunk.new_zeros(*chunk.shape[:-1], top_k)
    scores[..., : score.shape[-1]], chunks[..., : score.shape[-1]] = score, chunk
    return scores, chunks


def taken(tiles: list[tuple[Tensor, Tensor]]) -> Retrieved:
    """Scores and chunks (B, G, t, K) of tiles of queries, as the whole row's."""
    score, chunk = (torch.cat(parts, dim=2).transpose(1, 2) for parts in zip(*tiles, strict=True))
    found = score > -torch.inf
    return Retrieved(chunk.masked_fill(~found, 0), found)


def best_chunks(queries: Tensor, summaries: Tensor, end: Tensor, limits: Limits) -> tuple[Tensor, Tensor]:
    """The K best scores, -inf where there are fewer candidates, and their chunks, both (B, G, T, K), best first.

    queries (B, G, T, E), summaries (B, G, E, J); candidates are among the first `end` (B or 1, 1, T) summaries.
    """
    top_k = limits.top_k
    score = queries.new_full((*queries.shape[:3], top_k), -torch.inf)
    chunk = torch.zeros_like(score, dtype=torch.long)
    sure = 0 if end.is_cuda or limits.hidden else int(end.min())  # asking a GPU would wait for it
    for start in range(0, summaries.shape[3], SUMMARY_TILE):
        scores = queries @ summaries[..., start : start + SUMMARY_TILE]
        unsure = scores[..., max(0, sure - start) :]
        column = torch.arange(start + scores.shape[3] - unsure.shape[3], start + scores.shape[3], device=scores.device)
        hidden = column >= end[..., None]
        if limits.hidden:
            hidden |= (column >= limits.banked) & (column < limits.banked + limits.hidden)
        unsure.masked_fill_(hidden, -torch.inf)
        best, place = top_by_place(scores, top_k)
        found = [(score, chunk), (best, place + start)] if start else [(best, place)]
        merged, places = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
        if start:
            merged, order = merged.sort(dim=-1, descending=True, stable=True)  # the earlier chunks stand first
            places = places.gather(-1, order)
        count = min(top_k, merged.shape[3])
        score[..., :count], chunk[..., :count] = merged[..., :count], places[..., :count]
    return score, chunk


def top_by_place(scores: Tensor, top_k: int, *, in_order: bool = True) -> tuple[Tensor, Tensor]:
    """The K largest of scores (..., J), fewer where J is smaller, and their places; the first wins a tie.

    Best first, or not `in_order`: by their places. -inf is no candidate, and its place means nothing.
    """
    count = min(top_k, scores.shape[-1])
    if not in_order and count == scores.shape[-1]:
        return scores, torch.arange(count, device=scores.device).expand_as(scores)
    if torch.compiler.is_compiling():  # what follows asks for values
        best, place = (x[..., :count] for x in scores.sort(dim=-1, descending=True, stable=True))
        if in_order:
            return best, place
        place, order = place.sort(-1)
        return best.gather(-1, order), place
    if count == scores.shape[-1] or not count:
        return scores.sort(dim=-1, descending=True, stable=True)
    best, place = scores.topk(count + 1)
    least, next_one = best[..., count - 1], best[..., count]
    tied = (least == next_one) & (next_one > -torch.inf)
    if bool(tied.any()):  # which of equal ones `topk` takes is not said
        chosen = scores[tied].sort(dim=-1, descending=True, stable=True)
        best[tied], place[tied] = chosen.values[..., : count + 1], chosen.indices[..., : count + 1]
    place, order = place[..., :count].sort(-1)
    best = best[..., :count].gather(-1, order)
    if not in_order:
        return best, place
    best, order = best.sort(dim=-1, descending=True, stable=True)
    return best, place.gather(-1, order)
