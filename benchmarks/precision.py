"""The quick preset in three precisions: held-out loss of each, against float32.

    python benchmarks/precision.py
    python benchmarks/precision.py --attention_type fmka

Same model, batches and steps; autocast alone differs. One line of JSON last.
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
    max_steps: int = QUICK.max_steps


def main(options: Options) -> None:
    keep_freed_memory()
    ranks = start_ranks()
    quick = quick_run(ranks)
    losses: dict[str, float] = {}
    skipped: dict[str, int] = {}
    for name in ("float32", "bfloat16", "float16"):
        precision = Precision(name, ranks.device.type)
        model = quick.model(options.attention_type)
        run = train(model, quick.plan(options.max_steps, precision), look=lambda: 0.0)
        held_out = quick.corpus.splits["validation"]
        scored = evaluation_batches(held_out, QUICK.sequence_length, QUICK.batch_size, QUICK.eval_tokens)
        losses[name] = held_out_loss(model, scored, ranks.device, precision.autocast()).loss
        skipped[name] = run.skipped_steps
        away = 100 * (losses[name] / losses["float32"] - 1)
        print(f"{name}: held-out loss {losses[name]:.4f}, {away:+.3f} %, {skipped[name]} steps skipped", flush=True)
    print(json.dumps({"attention_type": options.attention_type, "losses": losses, "skipped_steps": skipped}))


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
