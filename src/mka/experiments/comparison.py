"""What the mechanisms of one run share: settings, tokens, ranks, folder and batches."""

from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import mka
from mka.data import BlockBatches, TokenizedCorpus, evaluation_batches, load_corpus, prepare_tokens
from mka.distributed import Ranks
from mka.experiments.environment import accumulation, describe_environment, describe_launch
from mka.experiments.folder import agree_with_folder, choose_folder, describe, identity, open_folder
from mka.record.config import PRESETS, ResolvedConfig
from mka.record.folders import claimed
from mka.record.results import flat
from mka.training import Precision, choose_precision


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What all mechanisms of one run share.

    Attributes:
        description: what every result in the folder has in common, as in config.json.
        environment: what the run is measured on, as in environment.json.
        deepspeed: DeepSpeed's settings; None: it is not used.
        finished: the (name, seed) pairs that already have a result.
    """

    config: ResolvedConfig
    corpus: TokenizedCorpus
    ranks: Ranks
    precision: Precision
    description: dict[str, Any]
    environment: dict[str, Any]
    folder: Path
    console: Console
    deepspeed: dict[str, Any] | None = None
    finished: frozenset[tuple[str, int]] = frozenset()

    @property
    def global_batch_size(self) -> int:
        """Rows per optimizer step, over all ranks and parts."""
        # From the folder, which may have been started on another number of ranks.
        return self.description["global_batch_size"]

    @property
    def accumulation(self) -> int:
        """Forward passes per optimizer step on each rank."""
        return accumulation(self.global_batch_size, self.config.batch_size, self.ranks.count)

    @property
    def rows_per_part(self) -> int:
        """Rows per forward pass on each rank."""
        return self.global_batch_size // self.ranks.count // self.accumulation

    def batches(self, seed: int) -> BlockBatches:
        """The rows of each optimizer step, the same for all mechanisms with one seed.

        Raises InputError if the train split does not fill one row.
        """
        length = self.config.sequence_length
        return BlockBatches(self.corpus.splits["train"].ids, length, self.global_batch_size, seed)

    def held_out(self, max_tokens: int | None = None) -> Any:
        """Batches of the validation split, of at most `max_tokens` tokens (None: the
        preset's).

        Raises InputError if the split does not fill one row.
        """
        config = self.config
        limit = max_tokens or PRESETS[config.preset].eval_tokens
        return evaluation_batches(
            self.corpus.splits["validation"], config.sequence_length, config.batch_size, limit
        )

    def num_steps(self) -> int:
        """Optimizer steps per training: --epochs or --max_steps, whichever ends
        first."""
        config, blocks = self.config, self.batches(seed=0).num_blocks
        limits = [] if config.max_steps is None else [config.max_steps]
        if config.epochs is not None:
            # Rounded up: a last step that the epochs do not fill is taken too.
            limits.append(-(-config.epochs * blocks // self.global_batch_size))
        return min(limits)


def prepare(
    config: ResolvedConfig,
    ranks: Ranks,
    console: Console,
    held: ExitStack,
    deepspeed: dict[str, Any] | None = None,
) -> Comparison:
    """Prepare a comparison: tokens, folder, and what the ranks agree on. Collective.

    held: keeps the first rank's claim on the folder until it is closed. Raises
    InputError, before anything is written into the folder, for settings or data that
    cannot work and for a folder that another run is writing to.
    """
    precision = choose_precision(ranks.device, config.fp16, config.bf16)
    vocab_size = PRESETS[config.preset].vocab_size
    # The other ranks of a machine find the tokens in the cache that its first rank has
    # filled.
    with ranks.first_of_machine_first():
        corpus = prepare_tokens(
            load_corpus(config.dataset, config.text_path), config.tokenizer, vocab_size
        )
    description = describe(config, corpus.summary, precision.name, ranks.count)
    # Another version on one machine would train a slightly different model there.
    software = {"mka": mka.__version__, "torch": torch.__version__}
    ranks.check_same(
        identity(description)
        | asdict(config)
        | flat({"deepspeed_config": deepspeed or {}})
        | software
    )
    folder = choose_folder(config, description)

    def comparison_of(description: dict[str, Any]) -> Comparison:
        """The comparison under the description that the folder agrees to."""
        comparison = Comparison(
            config=config,
            corpus=corpus,
            ranks=ranks,
            precision=precision,
            description=description,
            environment=describe_environment(ranks.device, precision.name),
            folder=folder,
            console=console,
            deepspeed=deepspeed,
        )
        launch = describe_launch(config, ranks, comparison.accumulation, deepspeed)
        return replace(comparison, environment=comparison.environment | {"launch": launch})

    def enter() -> tuple[dict[str, Any], set[tuple[str, int]]]:
        """Claim and open the folder; returns its description and what is finished in it."""
        agreed = agree_with_folder(folder, description, config.resume)
        comparison = comparison_of(agreed)
        # Called for their errors only: too little data is reported before the folder is
        # opened.
        comparison.held_out()
        comparison.batches(seed=0)
        held.enter_context(claimed(folder))
        # Again, under the claim: another run may have begun and ended since.
        agree_with_folder(folder, agreed, config.resume)
        return agreed, open_folder(folder, agreed, comparison.environment)

    agreed, finished = ranks.on_main(enter)
    return replace(comparison_of(agreed), finished=frozenset(finished))


def announce(comparison: Comparison) -> None:
    """Print data, budget, machine and launch, before the first training."""
    data, launch = comparison.corpus.summary, comparison.environment["launch"]
    sizes = {split: counts["tokens"] for split, counts in data["splits"].items()}
    steps = comparison.num_steps()
    tokens = steps * comparison.global_batch_size * comparison.config.sequence_length
    say = comparison.console.print
    say(
        f"Corpus     {data['dataset']}: {sizes['train']:,} training tokens, "
        f"{sizes['validation']:,} held out"
    )
    say(f"Split      {data['split_rule']}; {data['skipped']:,} files skipped (empty or not text)")
    say(f"Budget     {steps:,} steps, {tokens:,} tokens for each mechanism and seed")
    environment = comparison.environment
    say(
        f"Machine    {environment['processor']}, {environment['threads']} threads, "
        f"{comparison.precision.name}"
    )
    if comparison.ranks.count > 1:
        share = f"{comparison.rows_per_part} rows x {comparison.accumulation} parts on each"
        say(
            f"Ranks      {launch['world_size']} on {launch['machines']} machine(s), "
            f"{launch['strategy']}; {comparison.global_batch_size} rows per step: {share}"
        )
    say(f"Results    {comparison.folder}")
