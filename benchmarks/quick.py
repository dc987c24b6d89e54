"""The quick preset on Python's standard library, for the benchmarks of training."""

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from mka.data import BlockBatches, TokenizedCorpus, load_corpus, prepare_tokens
from mka.distributed import Ranks
from mka.models import build_model, preset_config
from mka.record.config import PRESETS, BenchmarkConfig, attention_options
from mka.training import Precision, TrainingPlan

QUICK = PRESETS["quick"]


@dataclass(frozen=True)
class QuickRun:
    """What the benchmarks of training share: one process, the corpus and the preset's batches."""

    ranks: Ranks
    corpus: TokenizedCorpus
    batches: BlockBatches

    def model(self, attention_type: str) -> nn.Module:
        """A new model of the preset with this mechanism, always with the same initial weights."""
        # The options that `mka bench` would give it by default.
        options: dict[str, Any] = attention_options(attention_type, BenchmarkConfig())
        tokenizer = self.corpus.tokenizer
        # A BPE trained on little text may have fewer tokens than the preset asks for.
        config = preset_config(replace(QUICK, vocab_size=tokenizer.vocab_size), tokenizer.eos_id)
        return build_model(config, attention_type, **options)

    def plan(self, steps: int, precision: Precision) -> TrainingPlan:
        """A plan for this many steps on the preset's batches, from the first one on."""
        return TrainingPlan(
            batch_at=self.batches.at,
            steps=steps,
            accumulation=1,
            learning_rate=QUICK.learning_rate,
            precision=precision,
            ranks=self.ranks,
        )


def quick_run(ranks: Ranks) -> QuickRun:
    """Load the corpus and prepare its batches."""
    corpus = prepare_tokens(load_corpus("stdlib"), QUICK.tokenizer, QUICK.vocab_size)
    batches = BlockBatches(
        corpus.splits["train"].ids, QUICK.sequence_length, QUICK.batch_size, seed=0
    )
    return QuickRun(ranks, corpus, batches)
