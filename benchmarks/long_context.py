"""Prefill, training step and decoding of one layer at long contexts, compared with causal mha.

    python benchmarks/long_context.py
    python benchmarks/long_context.py --tasks prefill --lengths 8192 32768 --turns 5

512 wide, 8 heads, --num_kv_heads key/value heads, w = 256, c = 64, K = 4, rotary positions. mha has
8 key/value heads and no window; "windowed" is gqa with the key/value heads, window and sinks of mka
and fmka. Prefill and decoding are without gradients. All variants take turns in one process; ratios
are medians of each variant's ratio to mha in the same turn. Prints one line of JSON on the
processor, then one per row, as soon as it is known.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from filled_states import fill
from mka.attention import CausalAttention, build_attention
from mka.ops.rotary import RotaryEmbedding
from mka.training import keep_freed_memory

HIDDEN_SIZE, NUM_HEADS = 512, 8
MEMORY = {"local_window": 256, "chunk_size": 64, "top_k": 4}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "mha": ("mha", {}),
    "windowed": ("gqa", {"local_window": MEMORY["local_window"]}),
    "mka": ("mka", MEMORY),
    "routed": ("mka", MEMORY | {"mix": "routed", "longterm_positions": "clamped"}),
    "fmka": ("fmka", MEMORY),
}
# As /proc/cpuinfo names them; they decide how fast products of matrices are.
FEATURES = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")
Task = Literal["prefill", "train", "decode", "crossover"]
LENGTHS: dict[Task, tuple[int, ...]] = {
    "prefill": (8192, 32768, 131072),
    "train": (8192, 32768),
    "decode": (131072, 1048576),
    "crossover": (256, 512, 1024, 2048, 4096),
}
LONGEST_MHA = 131072
"""Longest context of mha; beyond it, its cache would be larger than any other here."""
DECODED = 16
"""Tokens to decode per turn."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    tasks: tuple[Task, ...] = ("prefill", "train", "decode", "crossover")
    """What to time: prefill, train, decode, crossover (training steps at short contexts)."""
    lengths: tuple[int, ...] = ()
    """Lengths of the context, in tokens; default: those of each task."""
    kinds: tuple[str, ...] = tuple(KINDS)
    """Variants to measure: mha, windowed, mka, routed, fmka."""
    num_kv_heads: int = 2
    """Number of key/value heads of all variants except mha."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of weights and inputs: bfloat16 or float32."""
    threads: int = 1
    """Number of CPU threads."""
    turns: int = 3
    """Turns per row."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device to measure on: cpu or cuda."""


def main(options: Options) -> None:
    """Measure each task at each length, and print the rows."""
    keep_freed_memory()
    torch.set_num_threads(options.threads)
    print(json.dumps(processor(options) | {"dtype": options.dtype}), flush=True)
    for task in options.tasks:
        for tokens in options.lengths or LENGTHS[task]:
            # Without mha, rows of longer contexts have times but no ratio.
            kinds = [kind for kind in options.kinds if kind != "mha" or tokens <= LONGEST_MHA]
            measure(task, tokens, kinds, options)


def processor(options: Options) -> dict[str, Any]:
    """The processor's name and, of a CPU, which of FEATURES it has."""
    if options.device == "cuda":
        return {"processor": torch.cuda.get_device_name()}
    # Linux only; elsewhere the processor is "unknown".
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    values = {name.strip(): value.strip() for name, value in fields.items()}
    has = set(values.get("flags", "").split())
    features = [name for name in FEATURES if name in has]
    return {
        "processor": values.get("model name", "unknown"),
        "features": features,
        "threads": options.threads,
    }


def measure(task: Task, tokens: int, kinds: list[str], options: Options) -> None:
    """Time all variants on one task and length, and print one row per variant."""
    torch.manual_seed(0)
    turns, dtype = options.turns, getattr(torch, options.dtype)
    runs = {
        kind: RUNS[task](layer(kind, dtype, options.num_kv_heads, options.device), tokens)
        for kind in kinds
    }
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(turns + 1):
        for kind, run in runs.items():
            taken = timed(run, options.device)
            # The first turn warms up and does not count.
            if turn:
                seconds[kind].append(taken)
    for kind in kinds:
        row = {
            "task": task,
            "tokens": tokens,
            "kind": kind,
            "seconds": round(median(seconds[kind]), 6),
        }
        if "mha" in seconds:
            ratios = [a / b for a, b in zip(seconds[kind], seconds["mha"], strict=True)]
            row["ratio"] = round(median(ratios), 4)
        print(json.dumps(row), flush=True)


def layer(kind: str, dtype: torch.dtype, num_kv_heads: int, device: str = "cpu") -> CausalAttention:
    """The layer of one variant, a name in KINDS."""
    name, options = KINDS[kind]
    # mha has as many key/value heads as heads, by definition.
    if name != "mha":
        options = options | {"num_kv_heads": num_kv_heads}
    rotary = RotaryEmbedding(HIDDEN_SIZE // NUM_HEADS)
    attn = build_attention(
        name, hidden_size=HIDDEN_SIZE, num_heads=NUM_HEADS, rotary=rotary, **options
    )
    return attn.to(device, dtype)


def timed(run: Callable[[], object], device: str) -> float:
    """The time of one call, in seconds."""
    started = time.perf_counter()
    run()
    # CUDA works asynchronously; without waiting, the time would be that of issuing the work.
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def prefill(attn: CausalAttention, tokens: int) -> Callable[[], object]:
    """A function that reads `tokens` tokens at once into a new state."""
    x = random(attn, tokens)

    @torch.no_grad()
    def run() -> Tensor:
        """Read them."""
        return attn(x, state=attn.initial_state(1))[0]

    return run


def training_step(attn: CausalAttention, tokens: int) -> Callable[[], object]:
    """A function that runs the layer over `tokens` tokens, forward and backward."""
    # With a gradient for x too, as a layer inside a model has.
    x = random(attn, tokens).requires_grad_()

    def run() -> None:
        """Run it once."""
        attn.zero_grad()
        attn(x)[0].sum().backward()

    return run


def decoding(attn: CausalAttention, tokens: int) -> Callable[[], object]:
    """A function that decodes tokens one by one after a context of `tokens` random tokens."""
    x = random(attn, DECODED)
    # The state grows by a few tokens per turn, which is nothing next to such contexts.
    state: Any = fill(attn.initial_state(1), tokens)

    @torch.no_grad()
    def run() -> None:
        """Decode DECODED more tokens."""
        nonlocal state
        for t in range(DECODED):
            _, state = attn(x[:, t : t + 1], state=state)

    return run


def random(attn: CausalAttention, tokens: int) -> Tensor:
    """Random inputs (1, tokens, HIDDEN_SIZE) of the layer's type, on its device."""
    like = next(attn.parameters())
    return torch.randn(1, tokens, HIDDEN_SIZE, dtype=like.dtype, device=like.device)


RUNS: dict[Task, Callable[[CausalAttention, int], Callable[[], object]]] = {
    "prefill": prefill,
    "train": training_step,
    "decode": decoding,
    "crossover": training_step,
}

if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
