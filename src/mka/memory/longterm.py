"""L3, the long-term level: completed chunks of the row's past, and the retrieval of the best of them.

    tokens     0 1 2 3 | 4 5 6 7 | 8 9 10 11 | 12 13     chunk size c = 4, window w = 5
    chunks     [  0  ]   [  1  ]   [   2   ]   open
    query 13   candidate  local window 9..13             chunk 1 ends at 7, before 9: a candidate too; chunk 2 is not

A chunk is a candidate for the query at t when its last token lies before the window: (j + 1) c <= t + 1 - w. Both
the completion of a chunk and the window depend on t alone, never on what comes later.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from mka.ops.precision import no_autocast, upcast

QUERY_TILE = 512
"""Queries scored at once: scores take (tile, T / c) per group, whatever T is."""


class Retrieved(NamedTuple):
    """Both (B, T, G, K). chunk: which ones, best first; found: False where there were fewer candidates."""

    chunk: Tensor
    found: Tensor


def chunk_means(x: Tensor, chunk_size: int) -> Tensor:
    """(B, T, ...) -> (B, T // c, ...): the mean of each completed chunk, in float32 or better."""
    chunks = x.shape[1] // chunk_size
    return upcast(x[:, : chunks * chunk_size].unflatten(1, (chunks, chunk_size))).mean(2)


def num_candidates(t: Tensor, chunk_size: int, window: int) -> Tensor:
    """Chunks that end before the window of the queries at t (0-based); window 0: every completed chunk."""
    return ((t + 1 - window) // chunk_size).clamp(min=0)


@torch.no_grad()
def retrieve(queries: Tensor, summaries: Tensor, *, chunk_size: int, window: int, top_k: int) -> Retrieved:
    """The K candidates with the largest inner product of query and summary; the earlier chunk wins a tie.

    queries (B, T, G, E), summaries (B, J, G, E), both before any rotary embedding.
    """
    batch, tokens, groups, _ = queries.shape
    index = torch.zeros(batch, tokens, groups, top_k, dtype=torch.long, device=queries.device)
    found = torch.zeros_like(index, dtype=torch.bool)
    with no_autocast(queries):
        queries, summaries = upcast(queries).transpose(1, 2), upcast(summaries).permute(0, 2, 3, 1)
        for start in range(0, tokens, QUERY_TILE):
            tile = slice(start, min(start + QUERY_TILE, tokens))
            reach = max(0, (tile.stop - window) // chunk_size)
            candidates = num_candidates(torch.arange(tile.start, tile.stop, device=index.device), chunk_size, window)
            scores = queries[:, :, tile] @ summaries[..., :reach]
            scores.masked_fill_(torch.arange(reach, device=index.device) >= candidates[:, None], -torch.inf)
            for rank in range(min(top_k, reach)):
                best, chunk = scores.max(-1)
                index[:, tile, :, rank] = chunk.transpose(1, 2)
                found[:, tile, :, rank] = (best > -torch.inf).transpose(1, 2)
                scores.scatter_(-1, chunk[..., None], -torch.inf)
    return Retrieved(index.masked_fill_(~found, 0), found)


def read_summaries(u: Tensor, keys: Tensor, means: Tensor, retrieved: Retrieved) -> Tensor:
    """r_t = sum over the retrieved chunks of softmax_j(u_t . s_j) S_j; zeros where nothing was found.

    u (B, T, E), keys s (B, J, E), means S (B, J, C), retrieved with G = 1. Returns (B, T, C).
    """
    index, found = retrieved.chunk.squeeze(2), retrieved.found.squeeze(2)
    with no_autocast(u):
        u, keys, means = upcast(u), upcast(keys), upcast(means)
        rows = torch.arange(u.shape[0], device=u.device)[:, None, None]
        # A huge finite input may overflow here; NaN would then reach earlier tokens through 0 * NaN in the attention.
        scores = (u.unsqueeze(2) * keys[rows, index]).sum(-1).nan_to_num().masked_fill(~found, -torch.inf)
        weights = torch.where(found.any(-1, keepdim=True), scores, 0).softmax(-1) * found
        bags = (index + rows * means.shape[1]).flatten(0, 1)
        read = embedding_bag(bags, means.flatten(0, 1), per_sample_weights=weights.flatten(0, 1), mode="sum")
    return read.unflatten(0, u.shape[:2])


def chunk_mask(retrieved: Retrieved, chunks: int, chunk_size: int) -> Tensor:
    """(B, T, G, chunks * c) bool: True for the tokens of the chunks that each query retrieved."""
    index, found = retrieved
    mask = torch.zeros(*index.shape[:3], chunks + 1, dtype=torch.bool, device=index.device)
    mask.scatter_(-1, index.masked_fill(~found, chunks), True)
    return mask[..., :chunks].repeat_interleave(chunk_size, dim=-1)
