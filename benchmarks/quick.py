"""The quick preset on the embedded corpus, for the benchmarks of training."""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from mka.config import PRESETS, BenchmarkConfig, attention_options
from mka.data import BlockBatches, TokenizedCorpus, load_corpus, prepare_tokens
from mka.distributed import Ranks
from mka.models import build_model, preset_config
from mka.training import Precision, TrainingPlan

QUICK = PRESETS["quick"]


@dataclass(frozen=True)
class QuickRun:
    """One process, the preset's batches."""

    ranks: Ranks
    corpus: TokenizedCorpus
    batches: BlockBatches

    def model(self, attention_type: str) -> nn.Module:
        options: dict[str, Any] = attention_options(attention_type, BenchmarkConfig())
        tokenizer = self.corpus.tokenizer
        config = preset_config(replace(QUICK, vocab_size=tokenizer.vocab_size), tokenizer.eos_id)
        return build_model(config, attention_type, **options)

    def plan(self, steps: int, precision: Precision) -> TrainingPlan:
        return TrainingPlan(
            batch_at=self.batches.at,
            steps=steps,
            accumulation=1,
            learning_rate=QUICK.learning_rate,
            precision=precision,
            ranks=self.ranks,
        )


def quick_run(ranks: Ranks) -> QuickRun:
    corpus = prepare_tokens(load_corpus("stdlib"), QUICK.tokenizer, QUICK.vocab_size)
    batches = BlockBatches(corpus.splits["train"].ids, QUICK.sequence_length, QUICK.batch_size, seed=0)
    return QuickRun(ranks, corpus, batches)
