"""The quick preset in three precisions: held-out loss of each, against float32.

    python benchmarks/precision.py
    python benchmarks/precision.py --attention_type fmka

Same model, batches and steps; autocast alone differs. One line of JSON last.
"""

import json
from dataclasses import dataclass
from typing import Any

import tyro

from mka.config import PRESETS, BenchmarkConfig, attention_options
from mka.data import BlockBatches, evaluation_batches, load_corpus, prepare_tokens
from mka.distributed import start_ranks
from mka.evaluation import held_out_loss
from mka.models import build_model, gpt2_config
from mka.training import Precision, TrainingPlan, keep_freed_memory, train

QUICK = PRESETS["quick"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to train."""

    attention_type: str = "mha"
    max_steps: int = QUICK.max_steps


def main(options: Options) -> None:
    keep_freed_memory()
    ranks = start_ranks()
    corpus = prepare_tokens(load_corpus("stdlib"), QUICK.tokenizer, QUICK.vocab_size)
    batches = BlockBatches(corpus.splits["train"].ids, QUICK.sequence_length, QUICK.batch_size, seed=0)
    config = gpt2_config(
        hidden_size=QUICK.hidden_size,
        num_hidden_layers=QUICK.num_hidden_layers,
        num_attention_heads=QUICK.num_attention_heads,
        vocab_size=corpus.tokenizer.vocab_size,
        max_position_embeddings=QUICK.sequence_length,
        eos_token_id=corpus.tokenizer.eos_id,
    )
    losses: dict[str, float] = {}
    skipped: dict[str, int] = {}
    for name in ("float32", "bfloat16", "float16"):
        precision = Precision(name, ranks.device.type)
        mechanism: dict[str, Any] = attention_options(options.attention_type, BenchmarkConfig())
        model = build_model(options.attention_type, config, **mechanism)
        plan = TrainingPlan(
            batch_at=batches.at,
            rows_per_step=QUICK.batch_size,
            tokens_per_step=QUICK.batch_size * QUICK.sequence_length,
            steps=options.max_steps,
            accumulation=1,
            learning_rate=QUICK.learning_rate,
            precision=precision,
            ranks=ranks,
        )
        run = train(model, plan, look=lambda: 0.0)
        scored = evaluation_batches(
            corpus.splits["validation"], QUICK.sequence_length, QUICK.batch_size, QUICK.eval_tokens
        )
        losses[name] = held_out_loss(model, scored, ranks.device, precision.autocast()).loss
        skipped[name] = run.skipped_steps
        away = 100 * (losses[name] / losses["float32"] - 1)
        print(f"{name}: held-out loss {losses[name]:.4f}, {away:+.3f} %, {skipped[name]} steps skipped", flush=True)
    print(json.dumps({"attention_type": options.attention_type, "losses": losses, "skipped_steps": skipped}))


if __name__ == "__main__":
    main(tyro.cli(Options, use_underscores=True))
