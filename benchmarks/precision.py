"""The quick preset in three precisions: the held-out loss of each, compared with float32.

    python benchmarks/precision.py
    python benchmarks/precision.py --attention_type fmka

Model, batches and steps are the same; only autocast differs. The last line is JSON.
"""

import json
from dataclasses import dataclass

import tyro

from mka.data import evaluation_batches
from mka.distributed import start_ranks
from mka.evaluation import held_out_loss
from mka.training import Precision, keep_freed_memory, train
from quick import QUICK, quick_run


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to train."""

    attention_type: str = "mha"
    """The attention mechanism: mha, mqa, gqa, mla, mka or fmka."""
    max_steps: int = QUICK.max_steps
    """Optimizer steps per training."""


def main(options: Options) -> None:
    """Train in each precision, and print losses and skipped steps."""
    keep_freed_memory()
    ranks = start_ranks()
    quick = quick_run(ranks)
    losses: dict[str, float] = {}
    skipped: dict[str, int] = {}
    # float32 first: the others are compared with it as soon as they are known.
    for name in ("float32", "bfloat16", "float16"):
        precision = Precision(name, ranks.device.type)
        # A new model each time, with the same initial weights.
        model = quick.model(options.attention_type)
        # The held-out loss during the training is not needed, so looking at it costs nothing.
        run = train(model, quick.plan(options.max_steps, precision), look=lambda: 0.0)
        held_out = quick.corpus.splits["validation"]
        scored = evaluation_batches(
            held_out, QUICK.sequence_length, QUICK.batch_size, QUICK.eval_tokens
        )
        losses[name] = held_out_loss(model, scored, ranks.device, precision.autocast()).loss
        skipped[name] = run.skipped_steps
        away = 100 * (losses[name] / losses["float32"] - 1)
        line = f"{name}: held-out loss {losses[name]:.4f}, {away:+.3f} %"
        print(f"{line}, {skipped[name]} steps skipped", flush=True)
    print(
        json.dumps(
            {"attention_type": options.attention_type, "losses": losses, "skipped_steps": skipped}
        )
    )


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
