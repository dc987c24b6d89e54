"""L3, the long-term level: completed chunks of the row's past, and what is read in the
best of them.

    tokens     0 1 2 3 | 4 5 6 7 | 8 9 10 11 | 12 13     chunk size c = 4, window w = 5
    chunks     [  0  ]   [  1  ]   [   2   ]   open
    query 13   local window 9..13                        candidates: chunks 0 and 1, which end
                                                         before 9; not 2, which ends at
                                                         11

A chunk j is a candidate for the query at t if its last token lies before the window:

    (j + 1) c <= t + 1 - w

Both the completion of a chunk and the window depend on t alone, never on what comes
later. `mka.memory.search` finds the best candidates.
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
"""Stores of a state with one entry per chunk: what chunks are found by, and for fmka
also what is read."""
TILE_BYTES = 2**27
"""Most bytes, about, of the records that are fetched at once for a tile of queries."""
GATHERED_PAIRS, GATHERED_PAIRS_PER_CHUNK = 64, 2
"""Up to this many (query, chunk) pairs per group, or this many per existing chunk if
that is more, each query gathers its own tokens: sorting pairs by chunk only pays where
chunks are shared."""


def asked_at(x: Tensor, state: State | None) -> Tensor | None:
    """(B or 1, T): the token index at which each token of x (B, T, ...) asks for
    chunks; None means 0, 1, ..., without a state.

    Padding after a row's last token asks like that token, so it finds no chunk that
    does not exist.
    """
    if state is None:
        return None
    t = token_index(x, state)
    return (
        t
        if state.is_even
        else torch.minimum(t, torch.tensor(state.lengths, device=t.device)[:, None] - 1)
    )


def unhidden(x: Tensor, t: Tensor, sinks: int) -> Tensor:
    """x (B, T, ...) with zeros where the token index t is below `sinks`.

    Sinks are not read in their chunk, so the chunk is not found by them either.
    """
    return x if not sinks else x.masked_fill((t < sinks).view(*t.shape, *[1] * (x.dim() - 2)), 0)


def tokens_read(chunks: int, chunk_size: int, sinks: int, device: torch.device) -> Tensor:
    """(J,): how many tokens of each chunk are not sinks, at least 1."""
    # A chunk of sinks alone is never a candidate (`Limits.hide`); the 1 avoids dividing
    # by zero.
    ends = torch.arange(1, chunks + 1, device=device) * chunk_size
    return (ends - sinks).clamp(1, chunk_size)


def chunk_means(x: Tensor, chunk_size: int, sinks: int = 0) -> Tensor:
    """(B, T, ...) -> (B, T // c, ...): the mean of each completed chunk without the
    sinks, in float32 or better."""
    chunks = x.shape[1] // chunk_size
    # Float32 sums: a mean in bfloat16 would depend on the order in which calls bring
    # the tokens.
    x = upcast(x[:, : chunks * chunk_size])
    if sinks:
        x = unhidden(x, torch.arange(x.shape[1], device=x.device)[None], sinks)
    sums = x.unflatten(1, (chunks, chunk_size)).sum(2)
    return sums / tokens_read(chunks, chunk_size, sinks, x.device).view(-1, *[1] * (x.dim() - 2))


def chunk_entries(
    shape: tuple[int, ...], dtype: torch.dtype, chunk_size: int, block: int | None = None
) -> dict[str, Entry]:
    """The stores of `write_chunk_means`, each entry of `shape`: the sum over the open
    chunk so far, and the mean of every completed chunk. Both are float32 or better.

    block: makes records of the means, `block` entries each (`Entry`). Default: None.
    """
    return {
        "chunk_sum": Entry(shape, wide(dtype), latest=1),
        "chunk_mean": Entry(shape, wide(dtype), every=chunk_size, block=block),
    }


def write_chunk_means(x: Tensor, chunk_size: int, state: State, sinks: int = 0) -> Tensor:
    """Add to the state the means of the chunks that this call's x (B, T, ...)
    completes.

    Returns them as `State.write` takes them, (B, N, ...), a row's own in its first
    columns; N is 0 if no row completes a chunk.
    """
    # Rows may be at different places in their open chunk: each is shifted so that its
    # chunks begin at multiples of c, and one sum over (chunks, c) serves them all.
    filled = [past % chunk_size for past in state.past]
    chunks = (max(filled) + x.shape[1] + chunk_size - 1) // chunk_size
    start = torch.tensor(filled, device=x.device)
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    columns = start[:, None] + torch.arange(x.shape[1], device=x.device)
    x = unhidden(
        upcast(x), start_of(state, x)[:, None] + torch.arange(x.shape[1], device=x.device), sinks
    )
    aligned = x.new_zeros(x.shape[0], chunks * chunk_size, *x.shape[2:]).index_put(
        (rows, columns), x
    )
    # What earlier calls summed of the open chunk goes to its first place. Where a row
    # starts a new chunk the stored sum is that of the one before, and is dropped.
    if not state.is_fresh:
        carried = state.latest("chunk_sum", 1, after=False).squeeze(1)
        aligned[:, 0] += torch.where((start > 0).view(-1, *[1] * (x.dim() - 2)), carried, 0)
    # Running sums rather than totals: after a crop the open chunk continues from any of
    # its tokens.
    sums = aligned.unflatten(1, (chunks, chunk_size)).cumsum(2)
    state.write("chunk_sum", sums.flatten(1, 2)[rows, columns])
    if completed(chunk_size, state) == 0:
        return sums[:, :0, -1]
    # Divided by the tokens that are summed: the sinks are zeros in the sum, and do not
    # count.
    number = start_of(state, x)[:, None] // chunk_size + torch.arange(chunks, device=x.device)
    counts = ((number + 1) * chunk_size - sinks).clamp(1, chunk_size)
    fresh = sums[:, :, -1] / counts.view(*counts.shape, *[1] * (x.dim() - 2))
    state.write("chunk_mean", fresh)
    return fresh


def completed(chunk_size: int, state: State) -> int:
    """How many chunks this call completes, in the row with the most."""
    return max(
        n // chunk_size - past // chunk_size
        for past, n in zip(state.past, state.lengths, strict=True)
    )


def last_of_chunks(x: Tensor, chunk_size: int, state: State) -> Tensor:
    """(B or 1, N): the columns of x (B, T, ...) whose tokens complete a chunk.

    N is that of `write_chunk_means` if a chunk is completed; after those that it
    completes, a row has arbitrary columns.
    """
    filled = state.starts(x.device)[:, None] % chunk_size
    chunks = (
        max(past % chunk_size for past in state.past) + x.shape[1] + chunk_size - 1
    ) // chunk_size
    column = chunk_size * torch.arange(1, chunks + 1, device=x.device) - 1 - filled
    return column.clamp(max=x.shape[1] - 1)


def start_of(state: State, x: Tensor) -> Tensor:
    """(B,): tokens that each row had before this call, on the device of x."""
    return state.starts(x.device).expand(state.batch_size)


def read_summaries(
    u: Tensor, keys: Tensor, means: Tensor | Records, retrieved: Retrieved
) -> Tensor:
    """r_t = sum over the retrieved chunks of softmax_j(u_t . s_j) S_j, (B, T, C).

    Args:
        u: (B, T, E), index queries.
        keys: (B, J, E), the index keys s.
        means: (B, J, C), the chunks' means S, or the records that keep them.
        retrieved: with G = 1. Where nothing was found, r_t is zero.
    """
    index, found = retrieved.chunk.squeeze(2), retrieved.found.squeeze(2)
    with no_autocast(u):
        u = upcast(u)
        keys = keys.to(u.dtype)
        rows = torch.arange(u.shape[0], device=u.device)[:, None, None]
        # A huge finite input may overflow here, and NaN would reach earlier tokens
        # through 0 * NaN in the attention.
        scores = (
            (u.unsqueeze(2) * keys[rows, index])
            .sum(-1)
            .nan_to_num()
            .masked_fill(~found, -torch.inf)
        )
        # Where nothing was found, a softmax over -inf alone would be NaN.
        weights = torch.where(found.any(-1, keepdim=True), scores, 0).softmax(-1) * found
        if isinstance(means, Records):
            tiles = [means_read(part, weights) for part in fetched(retrieved, (means,))]
            return torch.cat(tiles, dim=1)
        # A weighted sum of K rows per token, without gathering (B, T, K, C) first.
        bags = (index + rows * means.shape[1]).flatten(0, 1)
        read = embedding_bag(
            bags,
            means.to(u.dtype).flatten(0, 1),
            per_sample_weights=weights.flatten(0, 1),
            mode="sum",
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
    """Attention of each query to the tokens of the chunks it retrieved; zeros if it
    found none.

    Args:
        q: (B, T, H, D).
        k, v: (B, S, G, D), S at least the tokens of all completed chunks.
        retrieved: K chunks per query and group.
        chunk_size: c, in tokens.
        seen: (S,) bool, the tokens that may be read. Default: None, all but the first
            `sinks`.
        sinks: tokens in front that are not read, without `seen`. Default: 0.
        lse: also return the log-sum-exps, which all paths but the first do anyway.
            Default: False.

    Returns a read of (B, T, H, D).
    """
    # Three ways to the same result: a copy of the keys per query, where queries are
    # few; unions of tiles, without gradients (they would keep all they gather); pairs
    # sorted by chunk.
    if are_few(retrieved, k.shape[1] // chunk_size):
        return gather_chunks(q, k, v, retrieved, chunk_size, seen, sinks=sinks, lse=lse)
    if seen is None and sinks:
        seen = torch.arange(k.shape[1], device=q.device) >= sinks
    # Unions look at values to decide, which torch.compile cannot trace.
    trained = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if not trained and not torch.compiler.is_compiling():
        together = attend_unions(q, k, v, *retrieved, chunk_size, seen)
        if together is not None:
            return Read(*together)
    values, sums = chunk_attention(q, k, v, *retrieved, chunk_size, seen)
    return Read(values.to(q.dtype), sums)


def are_few(retrieved: Retrieved, chunks: int) -> bool:
    """Whether there are so few (query, chunk) pairs that each query gathers its own
    tokens."""
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
    """`attend_chunks` for few queries: each gets a copy of the tokens that it reads."""
    batch, tokens, groups, _ = retrieved.chunk.shape
    offsets = torch.arange(chunk_size, device=q.device)
    index = (retrieved.chunk[..., None] * chunk_size + offsets).flatten(3)  # (B, T, G, K c)
    rows = torch.arange(batch, device=q.device).view(-1, 1, 1, 1)
    group = torch.arange(groups, device=q.device).view(-1, 1)
    # (B T G, K c, 1, D): every query and group is a row of its own, with one key/value
    # head.
    keys, values = (x[rows, index, group].flatten(0, 2).unsqueeze(2) for x in (k, v))
    mask = retrieved.found.repeat_interleave(chunk_size, dim=3)
    if seen is not None or sinks:
        mask = mask & (index >= sinks if seen is None else seen[index])
    queries = q.unflatten(2, (groups, -1)).flatten(0, 2).unsqueeze(1)  # (B T G, 1, H / G, D)
    read = attend_masked(
        queries.to(k.dtype), keys, values, mask.flatten(0, 2)[:, None, None], lse=lse
    )
    read = each(read, lambda x: x.flatten(1, 2).unflatten(0, (batch, tokens, groups)).flatten(2, 3))
    return each(read, lambda x: x.to(q.dtype), values_only=True)


@torch.no_grad()
@without_autocast
def sums_in_chunks(
    q: Tensor,
    k: Tensor,
    retrieved: Retrieved,
    chunk_size: int,
    seen: Tensor | None = None,
    *,
    sinks: int = 0,
) -> Tensor:
    """The log-sum-exps (B, T, G, K, H / G) of each query's scores in the chunks it
    retrieved.

    They cover the tokens that `attend_chunks` would read, and are -inf where nothing
    was found; float32 or better, without gradient. Arguments as there.
    """
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
    q: Tensor,
    k: Tensor,
    retrieved: Retrieved,
    chunk_size: int,
    seen: Tensor | None = None,
    *,
    sinks: int = 0,
) -> Tensor:
    """`sums_in_chunks` for few queries: each gets a copy of the keys that it meets."""
    groups = retrieved.chunk.shape[2]
    offsets = torch.arange(chunk_size, device=q.device)
    index = retrieved.chunk[..., None] * chunk_size + offsets  # (B, T, G, K, c)
    # Float32 or better, as on the other paths: the choice must not depend on the path.
    rows = torch.arange(len(q), device=q.device).view(-1, 1, 1, 1, 1)
    group = torch.arange(groups, device=q.device).view(-1, 1, 1)
    queries = upcast(q).unflatten(2, (groups, -1)) / math.sqrt(q.shape[-1])
    keys = k[rows, index, group].to(queries.dtype)  # (B, T, G, K, c, D)
    scores = keys.flatten(3, 4) @ queries.mT  # (B, T, G, K c, H / G)
    scores = scores.unflatten(3, index.shape[3:])
    hidden = ~(retrieved.found[..., None] & (index >= sinks if seen is None else seen[index]))
    return scores.masked_fill(hidden.unsqueeze(-1), -torch.inf).logsumexp(4)


class InTensor(Records):
    """A tensor of tokens (B, S, G, D) seen as records, one per chunk and group; no
    copy."""

    def __init__(self, x: Tensor, chunk_size: int) -> None:
        self.form = RecordForm(x.shape[2], chunk_size, x.shape[3], x.dtype)
        chunks = x.shape[1] // chunk_size
        self.data = x[:, : chunks * chunk_size].unflatten(1, (chunks, chunk_size))

    def read(self, row: Tensor, chunk: Tensor, group: Tensor) -> Tensor:
        """(N, c, D) of the N records named."""
        return self.data[row, chunk, :, group]


class Fetched(NamedTuple):
    """The N records that a tile of t queries reads, each of them once."""

    tile: slice
    """The queries, along T"""
    retrieved: Retrieved
    """(B, t, G, K), where `chunk` is an index into the N records"""
    records: tuple[Tensor, ...]
    """(N, block, width) from each store, on the device"""
    row: Tensor
    """(N,): the row of each record"""
    chunk: Tensor
    """(N,): its chunk"""


def fetched(retrieved: Retrieved, stores: tuple[Records, ...]) -> Iterator[Fetched]:
    """The queries in tiles, with the records that they chose, about TILE_BYTES at most.

    The records of the next tile are fetched while the present one is used.
    """
    batch, tokens, groups, top_k = retrieved.chunk.shape
    row = torch.arange(batch, device=retrieved.chunk.device).view(-1, 1, 1, 1)
    group = torch.arange(groups, device=retrieved.chunk.device).view(-1, 1)
    size = sum(records.form.chunk_bytes // records.form.groups for records in stores)
    step = max(1, TILE_BYTES // (batch * groups * top_k * size))

    def fetch(tile: slice) -> Fetched:
        """The records of one tile; runs in the other thread."""
        chunk, found = (x[:, tile] for x in retrieved)
        chunks = int(chunk.max()) + 1
        # Neighbors choose alike: naming each record once saves most of the reads and
        # transfers.
        wanted = ((row * groups + group) * chunks + chunk)[found]
        number, place = wanted.unique(return_inverse=True)
        # (row G + group) J + chunk, taken apart again.
        named = number // (groups * chunks), number % chunks, number // chunks % groups
        device = chunk.device
        records = tuple(store.read(*named).to(device, non_blocking=True) for store in stores)
        here = Retrieved(torch.zeros_like(chunk).masked_scatter(found, place), found)
        return Fetched(tile, here, records, *named[:2])

    tiles = [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]
    # A thread would cost more than it saves where there is nothing to wait for.
    if len(tiles) == 1 or isinstance(stores[0], InTensor):
        yield from map(fetch, tiles)
        return
    # One thread is enough: reading a store waits for a disk or a bus, not for the
    # interpreter.
    with ThreadPoolExecutor(1) as ahead:
        coming = ahead.submit(fetch, tiles[0])
        for following in [*tiles[1:], None]:
            here = coming.result()
            if following is not None:
                coming = ahead.submit(fetch, following)
            yield here


def means_read(part: Fetched, weights: Tensor) -> Tensor:
    """The weighted sum (B, t, C) of the means that a tile's t queries read, given the
    weights (B, T, K) of all queries."""
    place, found = (x.squeeze(2) for x in part.retrieved)
    weights = weights[:, part.tile]
    if not len(part.records[0]):
        return weights.new_zeros(*weights.shape[:2], part.records[0].shape[-1])
    means = part.records[0].flatten(1).to(weights.dtype)
    read = embedding_bag(
        place.flatten(0, 1), means, per_sample_weights=(weights * found).flatten(0, 1), mode="sum"
    )
    return read.unflatten(0, weights.shape[:2])
