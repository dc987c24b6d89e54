"""Prefill, training step and decoding of one layer at long contexts, mka and fmka against full causal mha.

    python benchmarks/long_context.py
    python benchmarks/long_context.py --tasks prefill --lengths 8192 32768 --turns 5

512 wide, 8 heads, 2 key/value heads, w = 256, c = 64, K = 4, rotary positions; mha has 8 key/value heads. Prefill and
decoding in bfloat16 without gradients, the training step in float32. All variants take turns in one process; figures
are medians of each variant's ratio to mha in the same turn. A line of JSON a row, as soon as it is known.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
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
MEMORY = {"num_kv_heads": 2, "local_window": 256, "chunk_size": 64, "top_k": 4}
Task = Literal["prefill", "train", "decode", "crossover"]
LENGTHS: dict[Task, tuple[int, ...]] = {
    "prefill": (8192, 32768, 131072),
    "train": (8192, 32768),
    "decode": (131072, 1048576),
    "crossover": (256, 512, 1024, 2048, 4096),
}
LONGEST_MHA = 131072
"""The cache of mha alone would be larger than that of any other here beyond this."""
DECODED = 16
"""Tokens of a turn of decoding."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    tasks: tuple[Task, ...] = ("prefill", "train", "decode", "crossover")
    lengths: tuple[int, ...] = ()
    """Default: those of each task."""
    kinds: tuple[str, ...] = ("mha", "mka", "fmka")
    turns: int = 3


def main(options: Options) -> None:
    keep_freed_memory()
    for task in options.tasks:
        for tokens in options.lengths or LENGTHS[task]:
            kinds = [kind for kind in options.kinds if kind != "mha" or tokens <= LONGEST_MHA]
            measure(task, tokens, kinds, options.turns)


def measure(task: Task, tokens: int, kinds: list[str], turns: int) -> None:
    """Print a row for each mechanism."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if task in ("prefill", "decode") else torch.float32
    runs = {kind: RUNS[task](layer(kind, dtype), tokens) for kind in kinds}
    seconds: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(turns + 1):
        for kind, run in runs.items():
            taken = timed(run)
            if turn:  # the first one warms up
                seconds[kind].append(taken)
    for kind in kinds:
        row = {"task": task, "tokens": tokens, "kind": kind, "seconds": round(median(seconds[kind]), 6)}
        if "mha" in seconds:
            row["ratio"] = round(median(a / b for a, b in zip(seconds[kind], seconds["mha"], strict=True)), 4)
        print(json.dumps(row), flush=True)


def layer(kind: str, dtype: torch.dtype) -> CausalAttention:
    options = {} if kind == "mha" else MEMORY
    rotary = RotaryEmbedding(HIDDEN_SIZE // NUM_HEADS)
    return build_attention(kind, hidden_size=HIDDEN_SIZE, num_heads=NUM_HEADS, rotary=rotary, **options).to(dtype)


def timed(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def prefill(attn: CausalAttention, tokens: int) -> Callable[[], object]:
    x = random(attn, tokens)

    @torch.no_grad()
    def run() -> Tensor:
        return attn(x, state=attn.initial_state(1))[0]

    return run


def training_step(attn: CausalAttention, tokens: int) -> Callable[[], object]:
    x = random(attn, tokens).requires_grad_()

    def run() -> None:
        attn.zero_grad()
        attn(x)[0].sum().backward()

    return run


def decoding(attn: CausalAttention, tokens: int) -> Callable[[], object]:
    """Tokens one by one after a context whose state holds random numbers."""
    state: Any = fill(attn.initial_state(1), tokens)
    x = random(attn, DECODED)

    @torch.no_grad()
    def run() -> None:
        nonlocal state
        for t in range(DECODED):
            _, state = attn(x[:, t : t + 1], state=state)

    return run


def random(attn: CausalAttention, tokens: int) -> Tensor:
    return torch.randn(1, tokens, HIDDEN_SIZE, dtype=next(attn.parameters()).dtype)


RUNS: dict[Task, Callable[[CausalAttention, int], Callable[[], object]]] = {
    "prefill": prefill,
    "train": training_step,
    "decode": decoding,
    "crossover": training_step,
}

if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
