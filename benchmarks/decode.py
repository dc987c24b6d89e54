"""What a decoded token costs: milliseconds and cache bytes by context, against transformers' own GPT-2.

    python benchmarks/decode.py
    python benchmarks/decode.py --sizes quick --contexts 1024 8192 --turns 5

One row, caches filled with random numbers. A mechanism and the reference take turns in one process, a token each; a
figure is the median of the turns, a ratio the median of their ratios. fmka with a window of 1,024, the others with
their defaults; gqa with 4 key/value heads. One line of JSON last.
"""

import gc
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import tyro
from transformers import DynamicCache, GPT2LMHeadModel

from filled_states import fill
from mka.config import PRESETS
from mka.models import CACHE_ARGUMENT, StateLayer, build_model, mechanisms, preset_config, states

KINDS: dict[str, dict[str, Any]] = {
    "mha": {},
    "mqa": {},
    "gqa": {"num_kv_heads": 4},
    "mla": {},
    "mka": {},
    "fmka": {"local_window": 1024},
}
DTYPES = {"quick": torch.float32, "gpt2": torch.bfloat16}
"""Two caches of the gpt2 size at 131,072 tokens take 19 GB in float32."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    sizes: tuple[str, ...] = ("quick", "gpt2")
    contexts: tuple[int, ...] = (1024, 8192, 32768, 131072)
    kinds: tuple[str, ...] = tuple(KINDS)
    turns: int = 7


def filled(model: Any, context: int) -> DynamicCache:
    """A cache as after `context` tokens, of random numbers, with room for the next ones."""
    cache = DynamicCache()
    for attention in mechanisms(model):
        layer: Any = StateLayer()
        layer.state = fill(attention.initial_state(1), context)
        layer.calls, layer.is_initialized = [(context, None)], True
        cache.layers.append(layer)
    return cache


def filled_reference(model: Any, context: int) -> DynamicCache:
    cache, config = DynamicCache(), model.config
    shape = (1, config.n_head, context, config.n_embd // config.n_head)
    for layer in range(config.n_layer):
        keys, values = (torch.randn(shape, dtype=model.dtype) for _ in range(2))
        cache.update(keys, values, layer)
    return cache


def step(model: Any, cache: DynamicCache) -> Callable[[], float]:
    token = torch.tensor([[7]])

    @torch.no_grad()
    def run() -> float:
        started = time.perf_counter()
        model(token, use_cache=True, **{CACHE_ARGUMENT: cache})
        return 1000 * (time.perf_counter() - started)

    return run


def measure(size: str, kind: str, context: int, turns: int) -> dict[str, Any]:
    config = preset_config(PRESETS[size])
    config.n_positions = context + 256
    model = build_model(config, kind, **KINDS[kind]).to(DTYPES[size]).eval()
    reference: Any = GPT2LMHeadModel(config).eval()
    reference.to(DTYPES[size])
    cache = filled(model, context)
    predicted = sum(attention.state_nbytes(1, context) for attention in mechanisms(model))
    held = sum(state.nbytes for state in states(cache))
    ours, theirs = step(model, cache), step(reference, filled_reference(reference, context))
    for run in (ours, theirs) * 2:
        run()
    pairs = [(ours(), theirs()) for _ in range(turns)]
    return {
        "size": size,
        "kind": kind,
        "context": context,
        "milliseconds": median(mine for mine, _ in pairs),
        "reference_milliseconds": median(other for _, other in pairs),
        "ratio": median(mine / other for mine, other in pairs),
        "cache_bytes": held,
        "predicted_bytes": predicted,
    }


def main(options: Options) -> None:
    rows = []
    for size in options.sizes:
        for context in options.contexts:
            for kind in options.kinds:
                row = measure(size, kind, context, options.turns)
                gc.collect()
                rows.append(row)
                print(
                    f"{size:6} {context:>7,} {kind:5} {row['milliseconds']:8.2f} ms/token  {row['ratio']:6.3f} of "
                    f"transformers' GPT-2 ({row['reference_milliseconds']:8.2f})  cache "
                    f"{row['cache_bytes'] / 2**20:9.2f} MiB, predicted {row['predicted_bytes'] / 2**20:9.2f}",
                    flush=True,
                )
    print(json.dumps({"threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
