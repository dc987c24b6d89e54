"""Candidate search on the keys of a trained model: recall of the best K against exact, and bytes touched per token.

    python examples/passkey_example.py
    python benchmarks/search.py --model runs/passkey/mka-w64-seed0

The model reads text of the standard library; the queries are those of its last 256 tokens, in every layer. Bytes are
those of summaries and codes that a query compares with (for faiss: of the summaries its graph visits). A line of JSON
for each search.
"""

import json
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
import tyro
from torch import Tensor

from mka.config import SEARCHES, LongTermConfig
from mka.data import load_corpus
from mka.evaluation.router import watch_queries
from mka.loading import load
from mka.memory import search
from mka.models import mechanisms, memory_cache, read_in_pieces, states

QUERIES = 256


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    model: str
    tokens: int = 131072


@torch.no_grad()
def main(options: Options) -> None:
    model, tokenizer = load(options.model)
    text = "".join(text for _, text in load_corpus("stdlib").documents["test"])
    ids = tokenizer(text[: 8 * options.tokens], return_tensors="pt", verbose=False).input_ids[:, : options.tokens]
    queries: dict[int, Tensor] = {}
    for number, attn in enumerate(mechanisms(model)):
        memories: Any = attn
        watch_queries(memories, lambda q, number=number: queries.update({number: q}))
    found: dict[str, list[Any]] = {}
    for kind in SEARCHES:
        cache = memory_cache(model, LongTermConfig(longterm_search=kind if kind == "lsh" else "exact"))
        read_in_pieces(model, ids, cache)
        found[kind] = [ask(attn, state, queries[n], kind) for n, (attn, state) in enumerate(pairs(model, cache))]
    exact = found["exact"]
    for kind, layers in found.items():
        same = [recall(ours.chunk, best.chunk) for (ours, _, _), (best, _, _) in zip(layers, exact, strict=True)]
        touched = sum(size for _, size, _ in layers) / sum(size for _, size, _ in exact)
        row = {
            "search": kind,
            "tokens": ids.shape[1],
            "recall": [round(value, 4) for value in same],
            "bytes_per_token": round(sum(size for _, size, _ in layers)),
            "of_exact": round(touched, 4),
            "ms_per_token": round(sum(seconds for _, _, seconds in layers) * 1000, 3),
        }
        print(json.dumps(row), flush=True)


def pairs(model: Any, cache: Any) -> Any:
    return zip(mechanisms(model), states(cache), strict=True)


def ask(attn: Any, state: Any, q: Tensor, kind: Any) -> tuple[Any, float, float]:
    """What the last queries retrieve, one by one as in decoding; bytes and seconds of one of them."""
    q = q[:, -QUERIES:]
    state.longterm = replace(state.longterm, config=LongTermConfig(longterm_search=kind))
    summaries = state.all(attn.index_store)
    t = torch.full((1, 1), state.lengths[0] - 1)
    search.search(q[:, :1], state, attn.index_store, t, attn.limits)  # the graph is built
    begun = time.perf_counter()
    answers = [search.search(one, state, attn.index_store, t, attn.limits) for one in q.split(1, dim=1)]
    seconds = (time.perf_counter() - begun) / QUERIES
    chunks, (groups, width) = summaries.shape[1], q.shape[2:]
    size = 4.0 * width * chunks * groups
    if kind == "lsh":
        reranked = min(chunks, max(search.RERANKED_LEAST * attn.top_k, chunks // search.RERANKED_SHARE))
        size = groups * (chunks * state.all(search.CODE).shape[-1] + 4.0 * width * reranked)
    if kind == "faiss":
        size = 4.0 * width * state.index.compared / (QUERIES + 1)
    joined = type(answers[0])(*(torch.cat(parts, dim=1) for parts in zip(*answers, strict=True)))
    return joined, size, seconds


def recall(ours: Tensor, best: Tensor) -> float:
    """The share of the best K that was found."""
    return (ours[..., :, None] == best[..., None, :]).any(-2).float().mean().item()


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__, use_underscores=True))
