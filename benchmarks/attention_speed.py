"""Time and memory of one attention layer, forward and backward, compared with plain causal mha.

    python benchmarks/attention_speed.py
    python benchmarks/attention_speed.py --lengths 512 4096 --dtypes float32

768 wide, 12 heads, batch 1. All variants take turns in one process; ratios are medians of each
variant's ratio to mha in the same turn. Prints one line of JSON per row, as soon as it is known,
and a table at the end.
"""

import gc
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from transformers import GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

from mka.attention import build_attention
from mka.ops.scan import causal_average
from mka.training import PeakMemory, keep_freed_memory

HIDDEN_SIZE, NUM_HEADS = 768, 12
VARIANTS: dict[str, tuple[str, dict[str, int | None]]] = {
    "mha": ("mha", {}),
    "gqa, 4 groups": ("gqa", {"num_kv_heads": 4}),
    "mqa": ("mqa", {}),
    "mla": ("mla", {}),
    "fmka, no window": ("fmka", {"local_window": None}),
    "fmka, window 256": ("fmka", {"local_window": 256}),
    "mka, window 256": ("mka", {"local_window": 256}),
}
LONGEST_LOOP = 4096
"""Most tokens to loop over; a longer loop would take longer than everything else."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    lengths: tuple[int, ...] = (512, 4096, 16384)
    """Lengths of the row, in tokens."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Data types to compute in, by autocast: float32, bfloat16."""
    turns: int = 0
    """Turns per length; 0: 15 at 512 tokens, fewer for longer rows, at least 3."""


def main(options: Options) -> None:
    """Measure all rows, and print them as a table."""
    keep_freed_memory()
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for tokens in options.lengths:
        turns = options.turns or min(15, max(3, 28672 // tokens))
        for dtype in options.dtypes:
            rows += announce(layer_rows(tokens, dtype, turns, device))
        rows += announce(scan_rows(tokens, turns, device))
    console = Console(width=110)
    table = Table("what", "T", "dtype", "against", "ratio", "ms", "peak MiB", box=None)
    for row in rows:
        peak = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:,.0f}"
        names = (row["what"], str(row["tokens"]), row["dtype"], row["against"])
        table.add_row(*names, f"{row['ratio']:.3f}", f"{row['seconds'] * 1e3:,.2f}", peak)
    console.print(table)


def announce(rows: list[dict]) -> list[dict]:
    """Print rows as lines of JSON; returns them."""
    for row in rows:
        print(json.dumps(row | {"threads": torch.get_num_threads()}), flush=True)
    return rows


def layer_rows(tokens: int, dtype: str, turns: int, device: torch.device) -> list[dict]:
    """The rows of all mechanisms and of transformers' attention, forward and backward."""
    x = torch.randn(1, tokens, HIDDEN_SIZE, device=device, requires_grad=True)
    layers: dict[str, nn.Module] = {"transformers GPT-2, sdpa": transformers_attention()}
    for name, (kind, kind_options) in VARIANTS.items():
        layers[name] = build_attention(
            kind, hidden_size=HIDDEN_SIZE, num_heads=NUM_HEADS, bias=True, **kind_options
        )
    steps = {name: step_of(layer.to(device), x, dtype) for name, layer in layers.items()}
    # Memory is measured apart from time: resetting the peak takes time itself.
    seconds = take_turns(steps, turns)
    peaks = {name: peak_of(step, device) for name, step in steps.items()}
    # The first row compares our mha with transformers'; all other rows compare with our mha.
    rows = [row("mha", tokens, dtype, "transformers GPT-2, sdpa", seconds, peaks)]
    return rows + [
        row(name, tokens, dtype, "mha", seconds, peaks)
        for name in layers
        if name in VARIANTS and name != "mha"
    ]


def transformers_attention() -> GPT2Attention:
    """GPT-2's attention layer from transformers, with its fused kernel."""
    # Without dropout, which ours does not have either.
    config = GPT2Config(n_embd=HIDDEN_SIZE, n_head=NUM_HEADS, attn_pdrop=0.0, resid_pdrop=0.0)
    config._attn_implementation = "sdpa"
    return GPT2Attention(config, layer_idx=0)


def step_of(layer: nn.Module, x: Tensor, dtype: str) -> Callable[[], None]:
    """A function that runs a layer over x (1, T, C), forward and backward."""

    def step() -> None:
        """Run the layer once."""
        # Fresh gradients each time: adding to old ones would take longer.
        layer.zero_grad(set_to_none=True)
        x.grad = None
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            y = layer(x)[0]
        y.float().sum().backward()

    return step


def scan_rows(tokens: int, turns: int, device: torch.device) -> list[dict]:
    """The rows of the session average alone, in float32.

    The forward pass is compared with x.clone(), and with the backward pass with a loop over tokens.
    """
    # A copy of x is the least that any function of x can take.
    x = torch.randn(1, tokens, HIDDEN_SIZE, device=device)
    decay = torch.linspace(0.1, 0.999, HIDDEN_SIZE, device=device)
    steps: dict[str, Callable[[], object]] = {
        "session scan": lambda: causal_average(x, decay),
        "x.clone()": x.clone,
    }
    rows = [row("session scan", tokens, "float32", "x.clone()", take_turns(steps, 5 * turns), {})]
    if tokens > LONGEST_LOOP:
        return rows
    trained, trained_decay = x.clone().requires_grad_(), decay.clone().requires_grad_()
    with_backward: dict[str, Callable[[], object]] = {
        "session scan, with backward": lambda: (
            causal_average(trained, trained_decay).sum().backward()
        ),
        "loop over tokens": lambda: loop_average(trained, trained_decay).sum().backward(),
    }
    seconds = take_turns(with_backward, min(turns, 5))
    return [
        *rows,
        row("session scan, with backward", tokens, "float32", "loop over tokens", seconds, {}),
    ]


def loop_average(x: Tensor, decay: Tensor) -> Tensor:
    """The session average of x (B, T, C) with decays (C,), token by token: (B, T, C)."""
    total, weight, means = torch.zeros_like(x[:, 0]), torch.zeros_like(decay), []
    for x_t in x.unbind(1):
        total, weight = decay * total + x_t, decay * weight + 1
        means.append(total / weight)
    return torch.stack(means, dim=1)


def take_turns(steps: Mapping[str, Callable[[], object]], turns: int) -> dict[str, list[float]]:
    """The seconds of each function, called once per turn; the first turn does not count."""
    # In turns, so that a machine that gets busy slows down all of them alike.
    timers = {name: Timer("step()", globals={"step": step}) for name, step in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in timers}
    for turn in range(turns + 1):
        for name, timer in timers.items():
            taken = timer.timeit(1).mean
            if turn:
                seconds[name].append(taken)
    return seconds


def peak_of(step: Callable[[], object], device: torch.device) -> int | None:
    """Peak bytes of one step above those before it; None where they cannot be measured."""
    # The peak is reset by PeakMemory, so that of one step is not hidden by a larger one before it.
    # What an earlier step left in cycles of references would be freed during this one.
    gc.collect()
    memory = PeakMemory(device)
    step()
    return memory.peak().allocated


def row(
    what: str,
    tokens: int,
    dtype: str,
    against: str,
    seconds: dict[str, list[float]],
    peaks: dict[str, int | None],
) -> dict:
    """One row: the time of `what`, its ratio to `against` in the same turns, and its peak."""
    ratios = [a / b for a, b in zip(seconds[what], seconds[against], strict=True)]
    return {
        "what": what,
        "tokens": tokens,
        "dtype": dtype,
        "against": against,
        "ratio": median(ratios),
        "seconds": median(seconds[what]),
        "turns": len(ratios),
        "peak_bytes": peaks.get(what),
    }


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
