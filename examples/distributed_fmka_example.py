"""Train a small FastMKA language model on every GPU of this machine, or on its processor cores.

python examples/distributed_fmka_example.py
python examples/distributed_fmka_example.py --num_ranks 2 --strategy fsdp

It starts its own ranks through torchrun. Each rank takes its share of every batch, and only the
first one prints.
"""

import os
import sys
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from torch.distributed.run import main as torchrun

from mka.data import BlockBatches, evaluation_batches, load_corpus, prepare_tokens
from mka.distributed import Ranks, start_ranks
from mka.evaluation import held_out_loss
from mka.models import build_model, gpt2_config
from mka.training import TrainingPlan, TrainingRun, choose_precision, keep_freed_memory, train

SEQUENCE_LENGTH, GLOBAL_BATCH_SIZE = 256, 16
MOST_RANKS = 4
"""The default limit on a CPU, where each rank has its own copy of Python and torch in memory."""


@dataclass(frozen=True, kw_only=True)
class Example:
    """Train a small FastMKA model on several ranks."""

    max_steps: int = 40
    """Number of optimizer steps, each of 16 x 256 tokens over all ranks."""
    num_ranks: int | None = None
    """Number of ranks: 1, 2, 4, 8 or 16. Default: one per GPU; without a GPU, one per core, at most
    4."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """How the ranks share the work: ddp (each holds the whole model) or fsdp (each holds a
    part)."""
    text_path: tuple[str, ...] = ()
    """Your own files or folders to train on. Default: Python's standard library."""


def main(example: Example) -> None:
    """Start the ranks with torchrun, or train if this process is one of them."""
    # torchrun runs this same file again; only the ranks that it starts have this variable.
    if "RANK" in os.environ:
        train_on(start_ranks(), example)
        return
    ranks = example.num_ranks or largest_divisor(
        torch.cuda.device_count() or min(MOST_RANKS, os.cpu_count() or 1)
    )
    if GLOBAL_BATCH_SIZE % ranks:
        sys.exit(f"num_ranks is {ranks}; it must divide the batch of {GLOBAL_BATCH_SIZE} rows")
    # Otherwise torchrun would give each rank a single thread.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    torchrun(["--standalone", f"--nproc_per_node={ranks}", __file__, *sys.argv[1:]])


def largest_divisor(limit: int) -> int:
    """The largest number of ranks, at most `limit`, that divides the global batch."""
    return max(ranks for ranks in range(1, limit + 1) if GLOBAL_BATCH_SIZE % ranks == 0)


def train_on(ranks: Ranks, example: Example) -> None:
    """Train on these ranks, and print progress and the held-out loss. Collective."""
    keep_freed_memory()
    # The first rank tokenizes the text; the others then find it in the cache.
    with ranks.first_of_machine_first():
        text = (
            load_corpus("text", example.text_path) if example.text_path else load_corpus("stdlib")
        )
        corpus = prepare_tokens(text, "bpe", vocab_size=8192)
    config = gpt2_config(
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        vocab_size=corpus.tokenizer.vocab_size,
        max_position_embeddings=SEQUENCE_LENGTH,
        eos_token_id=corpus.tokenizer.eos_id,
    )
    model = build_model(config, "fmka", local_window=64, num_kv_heads=2)
    batches = BlockBatches(corpus.splits["train"].ids, SEQUENCE_LENGTH, GLOBAL_BATCH_SIZE, seed=0)
    precision = choose_precision(ranks.device)

    def say(text: str) -> None:
        """Print a line on the first rank."""
        if ranks.is_main:
            print(text, flush=True)

    def look() -> float:
        """Print and return the held-out loss."""
        # Every rank scores its share of the batches, so all of them must call this.
        scored = evaluation_batches(
            corpus.splits["validation"], SEQUENCE_LENGTH, batch_size=8, max_tokens=16384
        )
        held = held_out_loss(model, scored, ranks.device, precision.autocast(), ranks)
        say(
            f"held out: {held.perplexity:8.1f} perplexity per token, {held.bits_per_byte:.3f} "
            "bits per byte"
        )
        return held.loss

    def progress(run: TrainingRun) -> None:
        """Print a line after every tenth step."""
        if len(run.losses) % 10 == 0:
            rate = run.tokens / run.seconds
            say(
                f"step {len(run.losses)}/{example.max_steps}, loss {run.losses[-1]:.3f}, "
                f"{rate:,.0f} tokens/s"
            )

    plan = TrainingPlan(
        batch_at=batches.at,
        steps=example.max_steps,
        accumulation=1,
        learning_rate=2e-3,
        precision=precision,
        ranks=ranks,
        strategy=example.strategy,
    )
    say(f"{ranks.count} rank(s) on {ranks.device.type}, {example.strategy}, {precision.name}")
    train(model, plan, look, progress)
    # Leaving the group together keeps one rank's exit from looking like a crash to the others.
    ranks.part()


if __name__ == "__main__":
    main(tyro.cli(Example, use_underscores=True))
