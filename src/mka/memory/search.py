"""How the best chunks are found: every candidate is scored, exactly, and the earlier
chunk wins a tie.

    retrieve          by q . s for each group, its queries summed, before any rotary
                      embedding
    retrieve_as_read  by the sum over a group's heads of softmax_j(q . s_j / sqrt(D)),
                      over all candidates j, with queries and mean keys as they will be
                      read
    best_by_keys      among chunks proposed in that way, by what the heads would read in
                      each: the share of its tokens in one softmax with window and sinks

With a softmax per head, one head that is sure outvotes many that are not; with a sum of
scores it does not.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mka.ops.precision import no_autocast, upcast

QUERY_TILE, SUMMARY_TILE = 512, 4096
"""Queries and summaries that are scored at once, which bounds the memory for scores,
per group, whatever T is."""
SCORES, SCORES_ON_GPU = 2**20, 2**26
"""Scores, over all heads, that are normalized at once: as many as fit a CPU's cache,
and as many as keep a GPU busy."""


class Retrieved(NamedTuple):
    """The chunks that queries retrieved, K per query and key/value head."""

    chunk: Tensor
    """(B, T, G, K): chunk numbers, best first or in order; 0 where `found` is False"""
    found: Tensor
    """(B, T, G, K): False where there were fewer than K candidates"""

    def split(self, near: "Near") -> "tuple[Retrieved, Retrieved]":
        """The chunks that are near, and the others; each found in exactly one of the
        two."""
        begins = (
            near.begins.expand(len(self.chunk), -1)
            .gather(1, self.chunk.flatten(1))
            .view_as(self.chunk)
        )
        is_near = begins >= near.since[:, :, None, None]
        return Retrieved(self.chunk, self.found & is_near), Retrieved(
            self.chunk, self.found & ~is_near
        )


class Near(NamedTuple):
    """Which chunks a query meets at their true distance: those that begin at `since` or
    later."""

    since: Tensor
    """(B or 1, T): a position for each query"""
    begins: Tensor
    """(B or 1, J): the position of each chunk's first token"""

    def all(self) -> Tensor:
        """(): whether every query meets every chunk at its true distance."""
        return (self.begins.amin(1) >= self.since.amax(1)).all()

    def marked(self, tile: slice, reach: int) -> Tensor:
        """(B or 1, t, reach) bool: True where a query of the tile is near one of the
        first `reach` chunks."""
        return self.begins[:, None, :reach] >= self.since[:, tile, None]


def near_at(t: Tensor, begins: Tensor, limit: int | None, banked: int) -> Near | None:
    """Which chunks queries meet at their true distance; None: all of them.

    Args:
        t: (T,) or (B, T), positions of the queries.
        begins: (B or 1, J), positions of the chunks' first tokens.
        limit: the largest distance that is near, in tokens (None: any).
        banked: how many chunks, in front, belong to a bank; those are never near.

    Under torch.compile, without a bank, all chunks must be near: the model fails on a
    longer row.
    """
    if limit is None and not banked:
        return None
    t = t if t.dim() == 2 else t[None]
    # Smaller than any `since`, so that chunks of a bank are near to no query.
    nowhere = torch.iinfo(torch.int64).min
    if banked:
        column = torch.arange(begins.shape[1], device=begins.device)
        begins = begins.masked_fill(column < banked, nowhere)
    near = Near(torch.full_like(t, nowhere + 1) if limit is None else t - limit, begins)
    if torch.compiler.is_compiling() and not banked:
        check: Any = torch._assert_async  # pyright: ignore[reportPrivateImportUsage]
        check(
            near.all(),
            f"a row is longer than max_distance, {limit}; a compiled model cannot read further",
        )
        return None
    return None if bool(near.all()) else near


class Limits(NamedTuple):
    """Which chunks are candidates, and how many of them are taken.

    A chunk of the row is a candidate if its last token lies before the window, and not
    all of its tokens are sinks, which are read anyway. Chunks of a bank always are.
    """

    chunk_size: int
    """c, in tokens"""
    window: int
    """w, in tokens; 0: every completed chunk lies before it"""
    top_k: int
    """K, chunks per query and group"""
    sinks: int = 0
    """First tokens of the row that are not read in their chunk"""
    banked: int = 0
    """Chunks of a bank, numbered before those of the row"""

    def end(self, t: Tensor) -> Tensor:
        """One past the last candidate of queries at token index t, counted from 0."""
        # (j + 1) c <= t + 1 - w  <=>  j < (t + 1 - w) // c.
        return ((t + 1 - self.window) // self.chunk_size).clamp(min=0) + self.banked

    def reach(self, context: int) -> int:
        """`end` for the last of `context` tokens."""
        return max(0, (context - self.window) // self.chunk_size) + self.banked

    @property
    def hidden(self) -> int:
        """How many chunks of the row consist of sinks alone."""
        return self.sinks // self.chunk_size

    def count(self, context: int) -> int:
        """How many candidates the last of `context` tokens has."""
        own = max(0, self.reach(context) - self.banked - self.hidden)
        return own + self.banked if self.top_k else 0

    def cut(self, chunks: int) -> "Limits":
        """The same, with no more per query than there are chunks: a K beyond that would
        only take memory."""
        return self._replace(top_k=min(self.top_k, chunks))

    def hide(self, scores: Tensor, end: Tensor, sure: int = 0) -> None:
        """Set scores (..., J) of chunks that are not candidates to -inf, in place.

        end broadcasts to (...) and is at least `sure` everywhere: columns before that
        are only checked for sinks.
        """
        column = torch.arange(sure, scores.shape[-1], device=scores.device)
        scores[..., sure:].masked_fill_(column >= end.unsqueeze(-1), -torch.inf)
        scores[..., self.banked : self.banked + self.hidden] = -torch.inf


class AsRead(NamedTuple):
    """Queries and mean keys as they meet when the chunk is read: rotated, if the model
    is."""

    queries: Tensor
    """(B, T, H, D)"""
    keys: Tensor
    """(B, J, G, D), the mean key of each chunk"""


@torch.no_grad()
def retrieve(
    queries: Tensor, summaries: Tensor, limits: Limits, t: Tensor | None = None
) -> Retrieved:
    """The K candidates with the largest inner product of query and summary, best first.

    Args:
        queries: (B, T, G, E), before any rotary embedding.
        summaries: (B, J, G, E), likewise.
        limits: which chunks are candidates.
        t: (B or 1, T), the token index of each query. Default: None, 0, 1, ...
    """
    tokens, tiles = queries.shape[1], []
    limits = limits.cut(summaries.shape[1])
    end = limits.end(torch.arange(tokens, device=queries.device)[None] if t is None else t)
    with no_autocast(queries):
        queries = upcast(queries).transpose(1, 2)
        summaries = summaries.to(queries.dtype).permute(0, 2, 3, 1)
        for tile in steps(tokens, QUERY_TILE):
            # Without a state a tile can leave out the chunks that are in its future.
            reach = summaries.shape[-1] if t is not None else limits.reach(tile.stop)
            tiles.append(
                best_chunks(queries[:, :, tile], summaries[..., :reach], end[:, None, tile], limits)
            )
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
    """The K candidates of which a group's heads would read most, judged by their mean
    keys.

    Args:
        near: queries and keys of chunks at their true distance.
        far: the same for chunks that are further away than is allowed (None: there are
            none).
        nearness: which chunks are near (None: all).
        limits: which chunks are candidates.
        t: (B or 1, T), the token index of each query. Default: None, 0, 1, ...
        by_place: list the earlier chunk first, not the better one. Default: False.
    """
    q, (chunks, groups) = near.queries, near.keys.shape[1:3]
    limits = limits.cut(chunks)
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
            is_near = (
                nearness.marked(tile, reach) if nearness is not None and len(parts) > 1 else None
            )
            score = (
                products(*parts[0])
                if is_near is None
                else products_of_both(parts[0], parts[1], is_near)
            )
            # A huge finite query may overflow, and NaN would rank above every number.
            score = score.nan_to_num_()
            limits.hide(score, end[:, None, None, tile], sure)
            # Hidden again after the softmax, which gives 0 where there is no candidate,
            # or NaN (here 0) for a query that has none: what was found is told by -inf
            # alone.
            mass = score.softmax(-1).nan_to_num_().sum(2)
            limits.hide(mass, end[:, None, tile], sure)
            best = top_by_place(mass, limits.top_k, in_order=not by_place)
            tiles.append(kept(*best, limits.top_k))
    return taken(tiles)


@torch.no_grad()
def best_by_keys(proposed: Retrieved, sums: Tensor, window: Tensor, top_k: int) -> Retrieved:
    """The K of the proposed chunks of which a group's heads would read most.

    Args:
        proposed: (B, T, G, N), the earlier chunk first.
        sums: (B, T, G, N, R), the log-sum-exp of each head's scores in them; -inf where
            nothing was found.
        window: (B, T, H), the log-sum-exp of all else that a head reads.
        top_k: K; with fewer proposed chunks, all of them are kept.
    """
    top_k = min(top_k, proposed.chunk.shape[3])
    # The share of each chunk in the head's softmax over window and proposed chunks, in
    # logarithms; then the logarithm of the sum over heads, which ranks as the sum does
    # but cannot underflow.
    total = torch.logaddexp(window.unflatten(2, sums.shape[2:5:2]), sums.logsumexp(3)).unsqueeze(3)
    # A huge finite query may overflow here too.
    share = (sums - total).nan_to_num_().logsumexp(-1)
    score, place = kept(
        *top_by_place(share.masked_fill_(~proposed.found, -torch.inf), top_k), top_k
    )
    found = score > -torch.inf
    return Retrieved(proposed.chunk.gather(3, place).masked_fill(~found, 0), found)


def surely(end: Tensor, tile: slice, limits: Limits, t: Tensor | None) -> int:
    """A number of chunks that are before the `end` (B or 1, T) of every query in the
    tile.

    They need no mask. It may be smaller than possible, 0 included, where the exact
    number is slow.
    """
    if t is None:
        return limits.reach(tile.start + 1)
    # Asking a GPU for a value would wait for all that it has yet to do.
    if end.is_cuda or torch.compiler.is_compiling():
        return 0
    return int(end[:, tile].min())


def by_group(pair: AsRead, groups: int, scale: float) -> tuple[Tensor, Tensor]:
    """Queries (B, G, R, T, D), times `scale`, and keys (B, G, D, J), both float32 or
    better."""
    q = upcast(pair.queries) * scale
    return q.unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4), pair.keys.to(q.dtype).permute(
        0, 2, 3, 1
    )


def products(queries: Tensor, keys: Tensor) -> Tensor:
    """Scores (B, G, R, t, J): the heads of a group are rows of one product, which reads
    the group's keys once."""
    return (queries.flatten(2, 3) @ keys).unflatten(2, queries.shape[2:4])


def products_of_both(
    near: tuple[Tensor, Tensor], far: tuple[Tensor, Tensor], is_near: Tensor
) -> Tensor:
    """`products` of `near` where is_near (B or 1, t, J), and of `far` elsewhere."""
    # Near chunks are mostly the last ones of a row. Columns before the first that is
    # near to anyone are multiplied as far only, columns after the last that is far to
    # anyone as near only.
    some, every = is_near.flatten(0, 1).any(0), is_near.flatten(0, 1).all(0)
    first, last = int((some.cumsum(0) == 0).sum()), len(every) - int(every.flip(0).cumprod(0).sum())
    score, own = products(far[0], far[1][..., :last]), products(near[0], near[1][..., first:])
    mixed = torch.where(
        is_near[:, None, None, :, first:last], own[..., : last - first], score[..., first:]
    )
    return torch.cat([score[..., :first], mixed, own[..., last - first :]], dim=-1)


def steps(tokens: int, step: int) -> Iterator[slice]:
    """Slices of 0 .. tokens, each of `step` tokens except the last."""
    for start in range(0, tokens, step):
        yield slice(start, min(start + step, tokens))


def kept(score: Tensor, chunk: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Scores and chunks of fewer than K candidates, filled up to (..., K) with -inf and
    chunk 0."""
    missing = top_k - score.shape[-1]
    if not missing:
        return score, chunk
    scores, chunks = (
        score.new_full((*score.shape[:-1], top_k), -torch.inf),
        chunk.new_zeros(*chunk.shape[:-1], top_k),
    )
    scores[..., : score.shape[-1]], chunks[..., : score.shape[-1]] = score, chunk
    return scores, chunks


def taken(tiles: list[tuple[Tensor, Tensor]]) -> Retrieved:
    """Scores and chunks (B, G, t, K) of consecutive tiles as one result for all
    queries."""
    # Chunk 0 where nothing was found: an index that can be gathered, whatever is then
    # hidden.
    score, chunk = (torch.cat(parts, dim=2).transpose(1, 2) for parts in zip(*tiles, strict=True))
    found = score > -torch.inf
    return Retrieved(chunk.masked_fill(~found, 0), found)


def best_chunks(
    queries: Tensor, summaries: Tensor, end: Tensor, limits: Limits
) -> tuple[Tensor, Tensor]:
    """The K best scores, -inf if there are fewer candidates, and their chunks: both (B,
    G, T, K), best first.

    queries (B, G, T, E), summaries (B, G, E, J); candidates are among the first `end`
    (B or 1, 1, T) summaries.
    """
    top_k = limits.top_k
    score = queries.new_full((*queries.shape[:3], top_k), -torch.inf)
    chunk = torch.zeros_like(score, dtype=torch.long)
    # Columns before `sure` are candidates of every query, so their scores need no mask,
    # unless the first of them are sinks. A GPU is not asked, as in `surely`.
    sure = 0 if end.is_cuda or limits.hidden else int(end.min())
    for start in range(0, summaries.shape[3], SUMMARY_TILE):
        scores = queries @ summaries[..., start : start + SUMMARY_TILE]
        unsure = scores[..., max(0, sure - start) :]
        column = torch.arange(
            start + scores.shape[3] - unsure.shape[3], start + scores.shape[3], device=scores.device
        )
        hidden = column >= end[..., None]
        if limits.hidden:
            hidden |= (column >= limits.banked) & (column < limits.banked + limits.hidden)
        unsure.masked_fill_(hidden, -torch.inf)
        best, place = top_by_place(scores, top_k)
        found = [(score, chunk), (best, place + start)] if start else [(best, place)]
        merged, places = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
        # Earlier chunks come first in `merged`, so a stable sort lets them win a tie.
        if start:
            merged, order = merged.sort(dim=-1, descending=True, stable=True)
            places = places.gather(-1, order)
        count = min(top_k, merged.shape[3])
        score[..., :count], chunk[..., :count] = merged[..., :count], places[..., :count]
    return score, chunk


def top_by_place(scores: Tensor, top_k: int, *, in_order: bool = True) -> tuple[Tensor, Tensor]:
    """The K largest of scores (..., J), or all J if there are fewer, and their places.

    The first of equal scores wins. They are listed best first, or, not `in_order`, by
    place. A score of -inf is not a candidate, and its place is arbitrary.
    """
    count = min(top_k, scores.shape[-1])
    if not in_order and count == scores.shape[-1]:
        return scores, torch.arange(count, device=scores.device).expand_as(scores)
    # The faster way below decides by values, which torch.compile cannot trace.
    if torch.compiler.is_compiling():
        best, place = (x[..., :count] for x in scores.sort(dim=-1, descending=True, stable=True))
        if in_order:
            return best, place
        place, order = place.sort(-1)
        return best.gather(-1, order), place
    if count == scores.shape[-1] or not count:
        return scores.sort(dim=-1, descending=True, stable=True)
    # topk reads the scores once where a sort takes J log J steps, but does not document
    # which of equal scores it takes. One score more than needed shows whether a tie
    # crosses the border; only such rows are sorted.
    best, place = scores.topk(count + 1)
    least, next_one = best[..., count - 1], best[..., count]
    tied = (least == next_one) & (next_one > -torch.inf)
    if bool(tied.any()):
        chosen = scores[tied].sort(dim=-1, descending=True, stable=True)
        best[tied], place[tied] = chosen.values[..., : count + 1], chosen.indices[..., : count + 1]
    # By place first, then stably by score: equal scores end in the order of their
    # places.
    place, order = place[..., :count].sort(-1)
    best = best[..., :count].gather(-1, order)
    if not in_order:
        return best, place
    best, order = best.sort(dim=-1, descending=True, stable=True)
    return best, place.gather(-1, order)
