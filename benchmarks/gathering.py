"""Two ways to read retrieved chunks, by the number of queries: gathering tokens, or by chunk.

    python benchmarks/gathering.py

8 heads of 64, 2 key/value heads, c = 64, K = 4, chunks chosen at random, no gradients, float32.
Both ways take turns in one process. Prints one line of JSON per size: medians, and whether
`attend_chunks` gathers there.
"""

import json
import time
from collections.abc import Callable
from statistics import median
from unittest import mock

import torch
from torch import Tensor

from mka.memory import longterm
from mka.memory.longterm import Retrieved
from mka.training import keep_freed_memory

HEADS, GROUPS, HEAD_DIM, CHUNK_SIZE, TOP_K = 8, 2, 64, 64, 4
CHUNKS, QUERIES, TURNS = (16, 128, 1024), (1, 16, 64, 256, 1024), 9


@torch.no_grad()
def main() -> None:
    """Compare both ways for each number of chunks and queries."""
    keep_freed_memory()
    torch.manual_seed(0)
    for chunks in CHUNKS:
        k, v = (torch.randn(1, chunks * CHUNK_SIZE, GROUPS, HEAD_DIM) for _ in range(2))
        for tokens in QUERIES:
            q = torch.randn(1, tokens, HEADS, HEAD_DIM)
            # The top of random numbers are random chunks, without one twice.
            chosen = torch.rand(1, tokens, GROUPS, chunks).topk(TOP_K).indices
            retrieved = Retrieved(chosen, torch.ones_like(chosen, dtype=torch.bool))
            compare(q, k, v, retrieved)


def compare(q: Tensor, k: Tensor, v: Tensor, retrieved: Retrieved) -> None:
    """Time both ways for queries (1, T, H, D) and keys and values (1, S, G, D); print a line."""

    def gathered() -> Tensor:
        """By copying the retrieved tokens of each query."""
        return longterm.gather_chunks(q, k, v, retrieved, CHUNK_SIZE).values

    def by_chunk() -> Tensor:
        """By sorting the queries by chunk."""
        return longterm.chunk_attention(q, k, v, *retrieved, CHUNK_SIZE, None)[0]

    # Only ways that give the same result are worth comparing; this call also warms up.
    torch.testing.assert_close(gathered(), by_chunk())
    # In turns, so that a machine that gets busy slows down both alike.
    times: list[tuple[float, float]] = [
        (seconds(gathered), seconds(by_chunk)) for _ in range(TURNS)
    ]
    # Which way `attend_chunks` takes here can only be seen from whether it calls the other.
    with mock.patch.object(longterm, "gather_chunks", wraps=longterm.gather_chunks) as gather:
        longterm.attend_chunks(q, k, v, retrieved, CHUNK_SIZE)
    row = {
        "chunks": k.shape[1] // CHUNK_SIZE,
        "queries": q.shape[1],
        "gathering_ms": round(1000 * median(gathering for gathering, _ in times), 2),
        "ratio": round(median(gathering / sorting for gathering, sorting in times), 2),
        "gathers": gather.called,
    }
    print(json.dumps(row), flush=True)


def seconds(work: Callable[[], Tensor]) -> float:
    """The time of one call, in seconds."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


if __name__ == "__main__":
    main()
