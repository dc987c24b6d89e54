"""Attention of queries to the chunks they chose, a few neighbours at a time: all read what any of them chose, masked.

    queries  q0: 2 0   q1: 0 1   q2: 2 0   q3: 1 2          tile of 4
    union    0 1 2                                            gathered once, for all heads of the group
    mask     q0: # . #   q1: # # .   q2: # . #   q3: . # #

Neighbours choose alike where text is read: 32 of them together about 4 times what one of them does, read in long
products by the fused kernel. Where they do not, sorting by chunk is faster (`mka.ops.chunks`), and the caller is told.

Shapes: q (B, T, H, D), k and v (B, S, G, D), chunk and found (B, T, G, K), seen (S,); c = chunk_size, J = S // c.
"""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad

from mka.ops.fused import attention_with_lse

QUERIES = 32
"""Neighbours that read together."""
LARGEST_UNION = 6
"""Chunks of a union for each that a query chose, up to which that is worth while."""
GATHERED = 2**22
"""Numbers of keys gathered at once."""


def attend_unions(
    q: Tensor, k: Tensor, v: Tensor, chunk: Tensor, found: Tensor, chunk_size: int, seen: Tensor | None
) -> tuple[Tensor, Tensor] | None:
    """Values (B, T, H, D) in q's dtype and log-sum-exps (B, T, H), as `chunk_attention` gives them; it keeps what it
    gathers for a backward pass. None: neighbours choose too differently."""
    batch, tokens, groups, top_k = chunk.shape
    chunks, width, heads = k.shape[1] // chunk_size, q.shape[3], q.shape[2] // groups
    ahead = -tokens % QUERIES
    tiles = (tokens + ahead) // QUERIES
    q, chunk, found = (
        pad(q, (0, 0, 0, 0, 0, ahead)),
        pad(chunk, (0, 0, 0, 0, 0, ahead)),
        pad(found, (0, 0, 0, 0, 0, ahead)),
    )
    chosen, there = (
        x.view(batch, tiles, QUERIES, groups, top_k).permute(0, 1, 3, 2, 4).reshape(-1, QUERIES * top_k)
        for x in (chunk, found)
    )  # (N, Q K), N = batch x tiles x groups
    present = torch.zeros(len(chosen), chunks + 1, dtype=torch.bool, device=q.device)
    present.scatter_(1, chosen.masked_fill(~there, chunks), True)
    present = present[:, :chunks]
    sizes = present.sum(1)
    if not len(sizes) or int(sizes.sum()) > LARGEST_UNION * top_k * len(sizes):
        return None
    place = present.cumsum(1) - 1
    queries = q.view(batch, tiles, QUERIES, groups, heads, width).permute(0, 1, 3, 4, 2, 5).flatten(0, 2)
    keys, values = (x[:, : chunks * chunk_size].unflatten(1, (chunks, chunk_size)) for x in (k, v))
    number = torch.arange(len(chosen), device=q.device)
    row, group = number // (tiles * groups), number % groups
    outputs, sums = [], []
    step = max(1, GATHERED // max(1, int(sizes.max()) * chunk_size * width))
    for start in range(0, len(chosen), step):
        part = slice(start, min(start + step, len(chosen)))
        union = max(1, int(sizes[part].max()))
        listed = torch.zeros(part.stop - start, union + 1, dtype=torch.long, device=q.device)
        every = torch.arange(chunks, device=q.device).expand(part.stop - start, -1)
        listed.scatter_(1, place[part].where(present[part], union), every)
        listed = listed[:, :union]
        at = row[part, None], listed, slice(None), group[part, None]
        mask = torch.zeros(part.stop - start, QUERIES, union + 1, dtype=torch.bool, device=q.device)
        column = place[part].gather(1, chosen[part]).masked_fill(~there[part], union)
        mask.scatter_(2, column.unflatten(1, (QUERIES, top_k)), True)
        mask = mask[..., :union].repeat_interleave(chunk_size, dim=2)
        if seen is not None:
            mask &= seen[: chunks * chunk_size].view(chunks, chunk_size)[listed].flatten(1).unsqueeze(1)
        gathered = [x[at].flatten(1, 2).unsqueeze(1).to(q.dtype) for x in (keys, values)]
        o, lse = attention_with_lse(queries[part], *gathered, mask.unsqueeze(1), 1 / math.sqrt(width))
        outputs.append(o)
        sums.append(lse)
    shape = (batch, tiles, groups, heads, QUERIES)
    o = torch.cat(outputs).view(*shape, width).permute(0, 1, 4, 2, 3, 5).reshape(batch, -1, q.shape[2], width)
    lse = torch.cat(sums).view(shape).permute(0, 1, 4, 2, 3).reshape(batch, -1, q.shape[2])
    return o[:, :tokens], lse[:, :tokens]
