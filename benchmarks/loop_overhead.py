"""What the training loop costs: its tokens per second, compared with a bare loop.

    python benchmarks/loop_overhead.py

Both loops have the same model, optimizer and batches: the quick preset with mha, float32 weights
under the machine's default precision. They take turns in one process, `--steps` steps per turn; the
result is the median of the ratios. The last line is JSON.
"""

import json
import time
from dataclasses import dataclass
from statistics import median

import torch
import tyro
from torch import nn
from torch.optim import AdamW

from mka.data import BlockBatches
from mka.distributed import start_ranks
from mka.training import choose_precision, keep_freed_memory, train
from quick import QUICK, quick_run


@dataclass(frozen=True, kw_only=True)
class Options:
    """How long to measure."""

    turns: int = 9
    """Number of turns that count."""
    steps: int = 4
    """Steps per loop and turn."""


def bare_loop(
    model: nn.Module, batches: BlockBatches, steps: int, autocast: torch.autocast
) -> None:
    """Train as one would write it by hand."""
    # The same recipe as in mka.training.optimizer, but for its schedule, which costs no time.
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = AdamW(groups, lr=QUICK.learning_rate, betas=(0.9, 0.95), fused=True)
    model.train()
    for step in range(steps):
        rows = batches.at(step)
        with autocast:
            logits = model(rows[:, :-1]).logits
            loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # The training loop reads each loss too, which waits for the device.
        loss.item()


def main(options: Options) -> None:
    """Measure both loops, and print their rates and the ratio."""
    keep_freed_memory()
    ranks = start_ranks()
    precision = choose_precision(ranks.device)
    quick = quick_run(ranks)
    plan = quick.plan(options.steps, precision)
    ours, bare = quick.model("mha"), quick.model("mha")
    seconds: dict[str, list[float]] = {"train": [], "bare": []}
    for turn in range(options.turns + 1):
        # The held-out loss is not part of what is compared.
        run = train(ours, plan, look=lambda: 0.0)
        started = time.perf_counter()
        bare_loop(bare, quick.batches, options.steps, precision.autocast())
        # The first turn warms up and does not count.
        if turn:
            seconds["train"].append(run.seconds)
            seconds["bare"].append(time.perf_counter() - started)
    ratio = median(b / t for t, b in zip(seconds["train"], seconds["bare"], strict=True))
    rate = {
        name: options.steps * QUICK.batch_size * QUICK.sequence_length / median(taken)
        for name, taken in seconds.items()
    }
    print(
        f"train {rate['train']:,.0f} tokens/s, a bare loop {rate['bare']:,.0f}: {ratio:.3f} of it"
    )
    print(
        json.dumps({"ratio": ratio, "tokens_per_second": rate, "threads": torch.get_num_threads()})
    )


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
