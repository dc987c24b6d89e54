"""L3, the long-term level: completed chunks of the row's past, and what is read in the best of them.

    tokens     0 1 2 3 | 4 5 6 7 | 8 9 10 11 | 12 13     chunk size c = 4, window w = 5
    chunks     [  0  ]   [  1  ]   [   2   ]   open
    query 13   candidate  local window 9..13             chunk 1 ends at 7, before 9: a candidate too; chunk 2 is not

A chunk is a candidate for the query at t when its last token lies before the window: (j + 1) c <= t + 1 - w. Both
the completion of a chunk and the window depend on t alone, never on what comes later. mka.memory.search finds the best.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from mka.memory.entry import Entry
from mka.memory.local import token_index
from mka.memory.search import Retrieved
from mka.memory.state import State
from mka.memory.store import RecordForm, Records
from mka.ops.attend import Read, attend_masked, each
from mka.ops.chunks import chunk_attention, chunk_sums
from mka.ops.precision import no_autocast, upcast, wide, without_autocast
from mka.ops.unions import attend_unions, union_sums

INDEX_STORES = ("chunk_mean", "far_mean", "chunk_place", "index_key")
"""Stores of a state that hold an entry for each chunk: what chunks are found by, and of fmka what is read."""
TILE_BYTES = 2**27
"""Records fetched at once for the queries of a tile take at most about this much."""
GATHERED_PAIRS, GATHERED_PAIRS_PER_CHUNK = 64, 2
"""Up to so many (query, chunk) pairs of a group, or for each chunk there is, tokens are gathered, not sorted."""


def asked_at(x: Tensor, state: State | None) -> Tensor | None:
    """(B or 1, T): the token index at which each token of x (B, T, ...) asks for chunks; None: 0, 1, ...

    What stands after a row's last token is padding: it asks as the last one does, for no chunk that is not there.
    """
    if state is None:
        return None
    t = token_index(x, state)
    return t if state.is_even else torch.minimum(t, torch.tensor(state.lengths, device=t.device)[:, None] - 1)


def unhidden(x: Tensor, t: Tensor, sinks: int) -> Tensor:
    """x (B, T, ...) with zeros at the row's first `sinks` tokens: chunks are found by what is read in them."""
    return x if not sinks else x.masked_fill((t < sinks).view(*t.shape, *[1] * (x.dim() - 2)), 0)


def tokens_read(chunks: int, chunk_size: int, sinks: int, device: torch.device) -> Tensor:
    """(J,): how many tokens of each chunk are no sinks, at least 1."""
    ends = torch.arange(1, chunks + 1, device=device) * chunk_size
    return (ends - sinks).clamp(1, chunk_size)


def chunk_means(x: Tensor, chunk_size: int, sinks: int = 0) -> Tensor:
    """(B, T, ...) -> (B, T // c, ...): the mean of each completed chunk less the sinks, in float32 or better."""
    chunks = x.shape[1] // chunk_size
    x = upcast(x[:, : chunks * chunk_size])
    if sinks:
        x = unhidden(x, torch.arange(x.shape[1], device=x.device)[None], sinks)
    sums = x.unflatten(1, (chunks, chunk_size)).sum(2)
    return sums / tokens_read(chunks, chunk_size, sinks, x.device).view(-1, *[1] * (x.dim() - 2))


def chunk_entries(
    shape: tuple[int, ...], dtype: torch.dtype, chunk_size: int, block: int | None = None
) -> dict[str, Entry]:
    """The stores of `write_chunk_means`: the sum of the open chunk's tokens so far, and the mean of every chunk."""
    return {
        "chunk_sum": Entry(shape, wide(dtype), latest=1),
        "chunk_mean": Entry(shape, wide(dtype), every=chunk_size, block=block),
    }


def write_chunk_means(x: Tensor, chunk_size: int, state: State, sinks: int = 0) -> Tensor:
    """Adds the means of the chunks that this call's x (B, T, ...) completes to the state.

    Returns them, those of each row first in (B, N, ...), as `State.write` wants them; N is 0 where none is completed.
    """
    filled = [past % chunk_size for past in state.past]
    chunks = (max(filled) + x.shape[1] + chunk_size - 1) // chunk_size
    start = torch.tensor(filled, device=x.device)
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    columns = start[:, None] + torch.arange(x.shape[1], device=x.device)
    x = unhidden(upcast(x), start_of(state, x)[:, None] + torch.arange(x.shape[1], device=x.device), sinks)
    aligned = x.new_zeros(x.shape[0], chunks * chunk_size, *x.shape[2:]).index_put((rows, columns), x)
    if not state.is_fresh:
        carried = state.latest("chunk_sum", 1, after=False).squeeze(1)
        aligned[:, 0] += torch.where((start > 0).view(-1, *[1] * (x.dim() - 2)), carried, 0)
    sums = aligned.unflatten(1, (chunks, chunk_size)).cumsum(2)
    state.write("chunk_sum", sums.flatten(1, 2)[rows, columns])
    if completed(chunk_size, state) == 0:
        return sums[:, :0, -1]
    number = start_of(state, x)[:, None] // chunk_size + torch.arange(chunks, device=x.device)
    counts = ((number + 1) * chunk_size - sinks).clamp(1, chunk_size)
    fresh = sums[:, :, -1] / counts.view(*counts.shape, *[1] * (x.dim() - 2))
    state.write("chunk_mean", fresh)
    return fresh


def completed(chunk_size: int, state: State) -> int:
    """Chunks that this call completes, of the row with most of them."""
    return max(n // chunk_size - past // chunk_size for past, n in zip(state.past, state.lengths, strict=True))


def last_of_chunks(x: Tensor, chunk_size: int, state: State) -> Tensor:
    """(B or 1, N): where, among the tokens of x (B, T, ...), those stand that complete a chunk.

    N is that of `write_chunk_means`; beyond what a row completes, any column.
    """
    filled = state.starts(x.device)[:, None] % chunk_size
    chunks = (max(past % chunk_size for past in state.past) + x.shape[1] + chunk_size - 1) // chunk_size
    column = chunk_size * torch.arange(1, chunks + 1, device=x.device) - 1 - filled
    return column.clamp(max=x.shape[1] - 1)


def start_of(state: State, x: Tensor) -> Tensor:
    """(B,): tokens that each row had seen before this call."""
    return state.starts(x.device).expand(state.batch_size)


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


def attend_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    retrieved: Retrieved,
    chunk_size: int,
    seen: Tensor | None = None,
    *,
    sinks: int = 0,
    lse: bool = False,
) -> Read:
    """Attention of each query to the tokens of the chunks it retrieved; nothing is read where nothing was found.

    q (B, T, H, D), k and v (B, S, G, D) with S at least the tokens of all completed chunks, of which those are read
    where `seen` (S,) is True, or without it all but the first `sinks`. Returns (B, T, H, D).
    """
    if are_few(retrieved, k.shape[1] // chunk_size):
        return gather_chunks(q, k, v, retrieved, chunk_size, seen, sinks=sinks, lse=lse)
    if seen is None and sinks:
        seen = torch.arange(k.shape[1], device=q.device) >= sinks
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if not trained and not torch.compiler.is_compiling():
        together = attend_unions(q, k, v, *retrieved, chunk_size, seen)
        if together is not None:
            return Read(*together)
    values, sums = chunk_attention(q, k, v, *retrieved, chunk_size, seen)
    return Read(values.to(q.dtype), sums)


def are_few(retrieved: Retrieved, chunks: int) -> bool:
    """Whether what is chosen of so many chunks is gathered, for each query by itself."""
    tokens, top_k = retrieved.chunk.shape[1], retrieved.chunk.shape[3]
    return tokens * top_k <= max(GATHERED_PAIRS, GATHERED_PAIRS_PER_CHUNK * chunks)


def gather_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    retrieved: Retrieved,
    chunk_size: int,
    seen: Tensor | None = None,
    *,
    sinks: int = 0,
    lse: bool = False,
) -> Read:
    """`attend_chunks` for few queries: each has a copy of its tokens."""
    batch, tokens, groups, _ = retrieved.chunk.shape
    offsets = torch.arange(chunk_size, device=q.device)
    index = (retrieved.chunk[..., None] * chunk_size + offsets).flatten(3)  # (B, T, G, K c)
    rows = torch.arange(batch, device=q.device).view(-1, 1, 1, 1)
    group = torch.arange(groups, device=q.device).view(-1, 1)
    keys, values = (x[rows, index, group].flatten(0, 2).unsqueeze(2) for x in (k, v))  # (B T G, K c, 1, D)
    mask = retrieved.found.repeat_interleave(chunk_size, dim=3)
    if seen is not None or sinks:
        mask = mask & (index >= sinks if seen is None else seen[index])
    queries = q.unflatten(2, (groups, -1)).flatten(0, 2).unsqueeze(1)  # (B T G, 1, H / G, D)
    read = attend_masked(queries.to(k.dtype), keys, values, mask.flatten(0, 2)[:, None, None], lse=lse)
    read = each(read, lambda x: x.flatten(1, 2).unflatten(0, (batch, tokens, groups)).flatten(2, 3))
    return each(read, lambda x: x.to(q.dtype), values_only=True)


@torch.no_grad()
@without_autocast
def sums_in_chunks(
    q: Tensor, k: Tensor, retrieved: Retrieved, chunk_size: int, seen: Tensor | None = None, *, sinks: int = 0
) -> Tensor:
    """The log-sum-exps (B, T, G, K, H / G) of each query's scores in the chunks it retrieved, of the tokens that
    `attend_chunks` reads; -inf where nothing was found. float32 or better."""
    if are_few(retrieved, k.shape[1] // chunk_size):
        return gathered_sums(q, k, retrieved, chunk_size, seen, sinks=sinks)
    if seen is None and sinks:
        seen = torch.arange(k.shape[1], device=q.device) >= sinks
    if not torch.compiler.is_compiling():
        together = union_sums(q, k, *retrieved, chunk_size, seen)
        if together is not None:
            return together
    return chunk_sums(q, k, *retrieved, chunk_size, seen)


def gathered_sums(
    q: Tensor, k: Tensor, retrieved: Retrieved, chunk_size: int, seen: Tensor | None = None, *, sinks: int = 0
) -> Tensor:
    """`sums_in_chunks` for few queries: each has a copy of its keys."""
    groups = retrieved.chunk.shape[2]
    index = retrieved.chunk[..., None] * chunk_size + torch.arange(chunk_size, device=q.device)  # (B, T, G, K, c)
    rows = torch.arange(len(q), device=q.device).view(-1, 1, 1, 1, 1)
    group = torch.arange(groups, device=q.device).view(-1, 1, 1)
    queries = upcast(q).unflatten(2, (groups, -1)) / math.sqrt(q.shape[-1])
    keys = k[rows, index, group].to(queries.dtype)  # (B, T, G, K, c, D)
    scores = keys.flatten(3, 4) @ queries.mT  # (B, T, G, K c, H / G)
    scores = scores.unflatten(3, index.shape[3:])
    hidden = ~(retrieved.found[..., None] & (index >= sinks if seen is None else seen[index]))
    return scores.masked_fill(hidden.unsqueeze(-1), -torch.inf).logsumexp(4)


class InTensor(Records):
    """Tokens (B, S, G, D) as records of their chunks."""

    def __init__(self, x: Tensor, chunk_size: int) -> None:
        self.form = RecordForm(x.shape[2], chunk_size, x.shape[3], x.dtype)
        chunks = x.shape[1] // chunk_size
        self.data = x[:, : chunks * chunk_size].unflatten(1, (chunks, chunk_size))

    def read(self, row: Tensor, chunk: Tensor, group: Tensor) -> Tensor:
        return self.data[row, chunk, :, group]


class Fetched(NamedTuple):
    """What the queries of a tile read: each record once."""

    tile: slice
    retrieved: Retrieved
    """(B, t, G, K), chunk numbering the records fetched"""
    records: tuple[Tensor, ...]
    """(N, block, width) of each store, on the device"""
    row: Tensor
    """(N,) of each record"""
    chunk: Tensor


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
        here = Retrieved(torch.zeros_like(chunk).masked_scatter(found, place), found)
        return Fetched(tile, here, records, *named[:2])

    tiles = [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]
    if len(tiles) == 1 or isinstance(stores[0], InTensor):
        yield from map(fetch, tiles)
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
