"""L3, the long-term level: completed chunks of the row's past, and the retrieval of the best of them.

    tokens     0 1 2 3 | 4 5 6 7 | 8 9 10 11 | 12 13     chunk size c = 4, window w = 5
    chunks     [  0  ]   [  1  ]   [   2   ]   open
    query 13   candidate  local window 9..13             chunk 1 ends at 7, before 9: a candidate too; chunk 2 is not

A chunk is a candidate for the query at t when its last token lies before the window: (j + 1) c <= t + 1 - w. Both
the completion of a chunk and the window depend on t alone, never on what comes later.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from mka.memory.entry import Entry
from mka.memory.state import State
from mka.memory.store import Records
from mka.ops.attend import attend_masked
from mka.ops.chunks import chunk_attention
from mka.ops.precision import no_autocast, upcast, wide

INDEX_STORES = ("chunk_mean", "index_key")
"""Stores of a state that hold an entry for each chunk: what chunks are found by, and of fmka what is read."""
QUERY_TILE, SUMMARY_TILE = 512, 4096
"""Queries and summaries scored at once: the scores take no more than that of each group, whatever T is."""
RUN = 32
"""Scores of neighbours that are compared at once, by their largest."""
TILE_BYTES = 2**27
"""Records fetched at once for the queries of a tile take at most about this much."""
GATHERED_PAIRS, GATHERED_PAIRS_PER_CHUNK = 64, 2
"""Up to so many (query, chunk) pairs of a group, or for each chunk there is, tokens are gathered, not sorted."""


class Retrieved(NamedTuple):
    """Both (B, T, G, K). chunk: which ones, best first; found: False where there were fewer candidates."""

    chunk: Tensor
    found: Tensor


def chunk_means(x: Tensor, chunk_size: int) -> Tensor:
    """(B, T, ...) -> (B, T // c, ...): the mean of each completed chunk, in float32 or better."""
    chunks = x.shape[1] // chunk_size
    return upcast(x[:, : chunks * chunk_size].unflatten(1, (chunks, chunk_size))).mean(2)


def chunk_entries(
    shape: tuple[int, ...], dtype: torch.dtype, chunk_size: int, block: int | None = None
) -> dict[str, Entry]:
    """The stores of `write_chunk_means`: the sum of the open chunk's tokens so far, and the mean of every chunk."""
    return {
        "chunk_sum": Entry(shape, wide(dtype), latest=1),
        "chunk_mean": Entry(shape, wide(dtype), every=chunk_size, block=block),
    }


def write_chunk_means(x: Tensor, chunk_size: int, state: State) -> Tensor:
    """Adds the means of the chunks that this call's x (B, T, ...) completes to the state.

    Returns them, those of each row first in (B, N, ...), as `State.write` wants them.
    """
    filled = [past % chunk_size for past in state.past]
    chunks = (max(filled) + x.shape[1] + chunk_size - 1) // chunk_size
    start = torch.tensor(filled, device=x.device)
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    columns = start[:, None] + torch.arange(x.shape[1], device=x.device)
    x = upcast(x)
    aligned = x.new_zeros(x.shape[0], chunks * chunk_size, *x.shape[2:]).index_put((rows, columns), x)
    if not state.is_fresh:
        carried = state.latest("chunk_sum", 1, after=False).squeeze(1)
        aligned[:, 0] += torch.where((start > 0).view(-1, *[1] * (x.dim() - 2)), carried, 0)
    sums = aligned.unflatten(1, (chunks, chunk_size)).cumsum(2)
    state.write("chunk_sum", sums.flatten(1, 2)[rows, columns])
    fresh = sums[:, :, -1] / chunk_size
    state.write("chunk_mean", fresh)
    return fresh


def num_candidates(t: Tensor, chunk_size: int, window: int) -> Tensor:
    """Chunks that end before the window of the queries at t (0-based); window 0: every completed chunk."""
    return ((t + 1 - window) // chunk_size).clamp(min=0)


@torch.no_grad()
def retrieve(
    queries: Tensor,
    summaries: Tensor,
    t: Tensor | None = None,
    *,
    chunk_size: int,
    window: int,
    top_k: int,
    banked: int = 0,
) -> Retrieved:
    """The K candidates with the largest inner product of query and summary; the earlier chunk wins a tie.

    queries (B, T, G, E), summaries (B, J, G, E), both before any rotary embedding; t (B or 1, T) the token index of
    each query (None: 0, 1, ...). The first `banked` summaries are of a bank's chunks, the far past of every token.
    """
    tokens = queries.shape[1]
    t_here = torch.arange(tokens, device=queries.device)[None] if t is None else t
    candidates = num_candidates(t_here, chunk_size, window) + banked
    with no_autocast(queries):
        queries = upcast(queries).transpose(1, 2)
        summaries = summaries.to(queries.dtype).permute(0, 2, 3, 1)
        tiles = []
        for start in range(0, tokens, QUERY_TILE):
            tile = slice(start, min(start + QUERY_TILE, tokens))
            reach = max(0, (tile.stop - window) // chunk_size) if t is None else summaries.shape[-1]
            tiles.append(best_chunks(queries[:, :, tile], summaries[..., :reach], candidates[:, None, tile], top_k))
        score, chunk = (torch.cat(parts, dim=2).transpose(1, 2) for parts in zip(*tiles, strict=True))
    found = score > -torch.inf
    return Retrieved(chunk.masked_fill(~found, 0), found)


def best_chunks(queries: Tensor, summaries: Tensor, candidates: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The K best scores, -inf where there are fewer candidates, and their chunks, both (B, G, T, K), best first.

    queries (B, G, T, E), summaries (B, G, E, J); the first `candidates` (B or 1, 1, T) summaries are candidates.
    """
    score = queries.new_full((*queries.shape[:3], top_k), -torch.inf)
    chunk = torch.zeros_like(score, dtype=torch.long)
    sure = 0 if candidates.is_cuda else int(candidates.min())  # asking a GPU would wait for it
    for start in range(0, summaries.shape[3], SUMMARY_TILE):
        scores = queries @ summaries[..., start : start + SUMMARY_TILE]
        unsure = scores[..., max(0, sure - start) :]
        column = torch.arange(start + scores.shape[3] - unsure.shape[3], start + scores.shape[3], device=scores.device)
        unsure.masked_fill_(column >= candidates[..., None], -torch.inf)
        best, place = top_by_place(scores, top_k)
        found = [(score, chunk), (best, place + start)] if start else [(best, place)]
        merged, places = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
        if start:
            merged, order = merged.sort(dim=-1, descending=True, stable=True)  # the earlier chunks stand first
            places = places.gather(-1, order)
        kept = min(top_k, merged.shape[3])
        score[..., :kept], chunk[..., :kept] = merged[..., :kept], places[..., :kept]
    return score, chunk


def top_by_place(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The K largest of scores (..., J), fewer where J is smaller, and their places, best first; the first wins a tie.

    `scores` is spent; -inf is no candidate, and its place means nothing. Where J is large they are looked for in K runs
    of neighbours: those whose largest score is highest, the earlier of equal ones first. Each of those has an entry
    that goes before all entries of any other run.
    """
    runs = scores.shape[-1] // RUN
    if runs <= top_k:
        return largest(scores, top_k)
    within = scores[..., : runs * RUN].unflatten(-1, (runs, RUN))
    # `largest` marks what it took with -inf: a run without a candidate must stand above that, or one is taken twice.
    _, run = largest(within.amax(-1).clamp(min=torch.finfo(scores.dtype).min), top_k)
    run = run.sort(-1).values
    neighbours = torch.arange(RUN, device=scores.device)
    places = (run.unsqueeze(-1) * RUN + neighbours).flatten(-2)
    rest = torch.arange(runs * RUN, scores.shape[-1], device=scores.device)
    places = torch.cat([places, rest.expand(*places.shape[:-1], -1)], dim=-1)
    best, found = largest(scores.gather(-1, places), top_k)
    return best, places.gather(-1, found)


def largest(scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """`top_by_place` by one pass for each of the K."""
    found = []
    for _ in range(min(top_k, scores.shape[-1])):
        best, place = scores.max(-1, keepdim=True)
        found.append((best, place))
        scores.scatter_(-1, place, -torch.inf)
    best, place = (torch.cat(parts, dim=-1) for parts in zip(*found, strict=True))
    return best, place


def read_summaries(u: Tensor, keys: Tensor, means: Tensor | Records, retrieved: Retrieved) -> Tensor:
    """r_t = sum over the retrieved chunks of softmax_j(u_t . s_j) S_j; zeros where nothing was found.

    u (B, T, E), keys s (B, J, E), means S (B, J, C) or where they are stored, retrieved with G = 1. Returns (B, T, C).
    """
    index, found = retrieved.chunk.squeeze(2), retrieved.found.squeeze(2)
    with no_autocast(u):
        u = upcast(u)
        keys = keys.to(u.dtype)
        rows = torch.arange(u.shape[0], device=u.device)[:, None, None]
        # A huge finite input may overflow here; NaN would then reach earlier tokens through 0 * NaN in the attention.
        scores = (u.unsqueeze(2) * keys[rows, index]).sum(-1).nan_to_num().masked_fill(~found, -torch.inf)
        weights = torch.where(found.any(-1, keepdim=True), scores, 0).softmax(-1) * found
        if isinstance(means, Records):
            tiles = [means_read(part, weights) for part in fetched(retrieved, (means,))]
            return torch.cat(tiles, dim=1)
        bags = (index + rows * means.shape[1]).flatten(0, 1)
        read = embedding_bag(
            bags, means.to(u.dtype).flatten(0, 1), per_sample_weights=weights.flatten(0, 1), mode="sum"
        )
    return read.unflatten(0, u.shape[:2])


def attend_chunks(q: Tensor, k: Tensor, v: Tensor, retrieved: Retrieved, chunk_size: int) -> Tensor:
    """Attention of each query to the tokens of the chunks it retrieved; zeros where nothing was found.

    q (B, T, H, D), k and v (B, S, G, D) with S at least the tokens of all completed chunks. Returns (B, T, H, D).
    """
    tokens, top_k = retrieved.chunk.shape[1], retrieved.chunk.shape[3]
    if tokens * top_k <= max(GATHERED_PAIRS, GATHERED_PAIRS_PER_CHUNK * k.shape[1] // chunk_size):
        return gather_chunks(q, k, v, retrieved, chunk_size)
    return chunk_attention(q, k, v, *retrieved, chunk_size)[0].to(q.dtype)


def gather_chunks(q: Tensor, k: Tensor, v: Tensor, retrieved: Retrieved, chunk_size: int) -> Tensor:
    """`attend_chunks` for few queries: each has a copy of its tokens."""
    batch, tokens, groups, _ = retrieved.chunk.shape
    offsets = torch.arange(chunk_size, device=q.device)
    index = (retrieved.chunk[..., None] * chunk_size + offsets).flatten(3)  # (B, T, G, K c)
    rows = torch.arange(batch, device=q.device).view(-1, 1, 1, 1)
    group = torch.arange(groups, device=q.device).view(-1, 1)
    keys, values = (x[rows, index, group].flatten(0, 2).unsqueeze(2) for x in (k, v))  # (B T G, K c, 1, D)
    mask = retrieved.found.repeat_interleave(chunk_size, dim=3).flatten(0, 2)[:, None]
    queries = q.unflatten(2, (groups, -1)).flatten(0, 2).unsqueeze(1)  # (B T G, 1, H / G, D)
    read = attend_masked(queries.to(k.dtype), keys, values, mask.unsqueeze(2))
    return read.flatten(1, 2).unflatten(0, (batch, tokens, groups)).flatten(2, 3).to(q.dtype)


class Fetched(NamedTuple):
    """What the queries of a tile read: each record once."""

    tile: slice
    retrieved: Retrieved
    """(B, t, G, K), chunk numbering the records fetched"""
    records: tuple[Tensor, ...]
    """(N, block, width) of each store, on the device"""


def fetched(retrieved: Retrieved, stores: tuple[Records, ...]) -> Iterator[Fetched]:
    """The queries in tiles, with the records they chose; those of the next tile are fetched while one is used."""
    batch, tokens, groups, top_k = retrieved.chunk.shape
    row = torch.arange(batch, device=retrieved.chunk.device).view(-1, 1, 1, 1)
    group = torch.arange(groups, device=retrieved.chunk.device).view(-1, 1)
    size = sum(records.form.chunk_bytes // records.form.groups for records in stores)
    step = max(1, TILE_BYTES // (batch * groups * top_k * size))

    def fetch(tile: slice) -> Fetched:
        chunk, found = (x[:, tile] for x in retrieved)
        chunks = int(chunk.max()) + 1
        wanted = ((row * groups + group) * chunks + chunk)[found]
        number, place = wanted.unique(return_inverse=True)
        named = number // (groups * chunks), number % chunks, number // chunks % groups
        device = chunk.device
        records = tuple(store.read(*named).to(device, non_blocking=True) for store in stores)
        return Fetched(tile, Retrieved(torch.zeros_like(chunk).masked_scatter(found, place), found), records)

    tiles = [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]
    if len(tiles) == 1:
        yield fetch(tiles[0])
        return
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(fetch, tiles[0])
        for following in [*tiles[1:], None]:
            here = coming.result()
            if following is not None:
                coming = ahead.submit(fetch, following)
            yield here


def means_read(part: Fetched, weights: Tensor) -> Tensor:
    """The weighted sum (B, t, C) of the means that a tile's queries read; weights (B, T, K) of all queries."""
    place, found = (x.squeeze(2) for x in part.retrieved)
    weights = weights[:, part.tile]
    if not len(part.records[0]):
        return weights.new_zeros(*weights.shape[:2], part.records[0].shape[-1])
    means = part.records[0].flatten(1).to(weights.dtype)
    read = embedding_bag(place.flatten(0, 1), means, per_sample_weights=(weights * found).flatten(0, 1), mode="sum")
    return read.unflatten(0, weights.shape[:2])


def attend_records(q: Tensor, keys: Records, values: Records, retrieved: Retrieved, chunk_size: int) -> Tensor:
    """`attend_chunks` where keys and values are stored apart: the records fetched are the chunks of one long row.

    q (B, T, H, D). Returns (B, T, H, D).
    """
    groups = retrieved.chunk.shape[2]
    reads = []
    for part in fetched(retrieved, (keys, values)):
        queries = q[:, part.tile]
        shape = queries.shape
        if not len(part.records[0]):
            reads.append(torch.zeros_like(queries))
            continue
        k, v = (x.flatten(0, 1)[None, :, None] for x in part.records)  # (1, N c, 1, D)
        rows = queries.unflatten(2, (groups, -1)).flatten(0, 2)[None]  # (1, B t G, H / G, D)
        chosen = Retrieved(*(x.flatten(0, 2)[None, :, None] for x in part.retrieved))
        reads.append(attend_chunks(rows, k, v, chosen, chunk_size).view(shape))
    return torch.cat(reads, dim=1)
