"""What a decoded token costs, compared with transformers' GPT-2: milliseconds and cache bytes.

    python benchmarks/decode.py
    python benchmarks/decode.py --sizes quick --contexts 1024 8192 --turns 5

One row, with caches of random numbers. A mechanism and the reference take turns in one process, one
token each; times are medians over the turns, ratios are medians of the ratios per turn. fmka has a
window of 1,024, gqa 4 key/value heads; otherwise the mechanisms have their defaults. The last line
is JSON.
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
from mka.models import CACHE_ARGUMENT, StateLayer, build_model, mechanisms, preset_config, states
from mka.record.config import PRESETS

KINDS: dict[str, dict[str, Any]] = {
    "mha": {},
    "mqa": {},
    "gqa": {"num_kv_heads": 4},
    "mla": {},
    "mka": {},
    "fmka": {"local_window": 1024},
}
DTYPES = {"quick": torch.float32, "gpt2": torch.bfloat16}
"""Data types by size. In float32, two gpt2 caches of 131,072 tokens would take 19 GB."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    sizes: tuple[str, ...] = ("quick", "gpt2")
    """Sizes of the model, as names of presets: quick, gpt2."""
    contexts: tuple[int, ...] = (1024, 8192, 32768, 131072)
    """Lengths of the context, in tokens."""
    kinds: tuple[str, ...] = tuple(KINDS)
    """Mechanisms to measure: mha, mqa, gqa, mla, mka, fmka."""
    turns: int = 7
    """Turns per model and context."""


def filled(model: Any, context: int) -> DynamicCache:
    """A cache as after `context` tokens, filled with random numbers, with room for more."""
    cache = DynamicCache()
    for attention in mechanisms(model):
        layer: Any = StateLayer()
        layer.state = fill(attention.initial_state(1), context)
        # As if all tokens had come in one call without padding.
        layer.calls, layer.is_initialized = [(context, None)], True
        cache.layers.append(layer)
    return cache


def filled_reference(model: Any, context: int) -> DynamicCache:
    """transformers' own cache after `context` tokens, filled with random numbers."""
    cache, config = DynamicCache(), model.config
    shape = (1, config.n_head, context, config.n_embd // config.n_head)
    for layer in range(config.n_layer):
        keys, values = (torch.randn(shape, dtype=model.dtype) for _ in range(2))
        cache.update(keys, values, layer)
    return cache


def step(model: Any, cache: DynamicCache) -> Callable[[], float]:
    """A function that decodes one token and returns its time in milliseconds."""
    # Which token it is does not matter for the time.
    token = torch.tensor([[7]])

    @torch.no_grad()
    def run() -> float:
        """Decode one more token."""
        started = time.perf_counter()
        model(token, use_cache=True, **{CACHE_ARGUMENT: cache})
        return 1000 * (time.perf_counter() - started)

    return run


def measure(size: str, kind: str, context: int, turns: int) -> dict[str, Any]:
    """The row of one mechanism, size and context."""
    config = preset_config(PRESETS[size])
    # Learned positions for the context and for the tokens that are decoded after it.
    config.n_positions = context + 256
    model = build_model(config, kind, **KINDS[kind]).to(DTYPES[size]).eval()
    reference: Any = GPT2LMHeadModel(config).eval()
    reference.to(DTYPES[size])
    cache = filled(model, context)
    # What the mechanism says of itself, to be compared with the bytes that are really held.
    predicted = sum(attention.state_nbytes(1, context) for attention in mechanisms(model))
    held = sum(state.nbytes for state in states(cache))
    ours, theirs = step(model, cache), step(reference, filled_reference(reference, context))
    # Two calls of each warm up and do not count.
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
    """Measure and print all rows, then all of them as one line of JSON."""
    rows = []
    for size in options.sizes:
        for context in options.contexts:
            for kind in options.kinds:
                row = measure(size, kind, context, options.turns)
                # Frees both models before the next two are made.
                gc.collect()
                rows.append(row)
                print(
                    f"{size:6} {context:>7,} {kind:5} {row['milliseconds']:8.2f} ms/token  "
                    f"{row['ratio']:6.3f} of transformers' GPT-2 "
                    f"({row['reference_milliseconds']:8.2f})  "
                    f"cache {row['cache_bytes'] / 2**20:9.2f} MiB, "
                    f"predicted {row['predicted_bytes'] / 2**20:9.2f}",
                    flush=True,
                )
    print(json.dumps({"threads": torch.get_num_threads(), "rows": rows}))


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
