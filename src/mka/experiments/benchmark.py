"""The main job: train and evaluate every mechanism under the same conditions, one result line each.

corpus -> tokens -> same batches in the same order -> model with one mechanism -> held-out loss -> results.jsonl
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from mka.config import ATTENTION_TITLES, PRESETS, BenchmarkConfig, ResolvedConfig, attention_options
from mka.data import BlockBatches, TokenizedCorpus, evaluation_batches, load_corpus, prepare_tokens
from mka.evaluation import HeldOutLoss, held_out_loss
from mka.experiments.environment import describe_environment
from mka.experiments.folder import choose_folder, describe, open_folder
from mka.experiments.progress import show_progress
from mka.models import build_model, gpt2_config, matched_intermediate_size, mechanisms
from mka.results import Result, append_result, write_curve
from mka.training import (
    NonFiniteLoss,
    PeakMemory,
    Precision,
    TrainingPlan,
    TrainingRun,
    choose_precision,
    keep_freed_memory,
    train,
)

LOOK_TOKENS = 2**13
"""Held-out tokens of one look during training; the result at the end is taken over the preset's eval_tokens."""
CACHE_DTYPE = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What all mechanisms of one run share."""

    config: ResolvedConfig
    corpus: TokenizedCorpus
    device: torch.device
    precision: Precision
    description: dict[str, Any]
    environment: dict[str, Any]
    folder: Path
    console: Console


def run_benchmark(given: BenchmarkConfig, console: Console, on_result: Callable[[Result], None]) -> Path:
    """Run what is missing of a comparison; returns its folder.

    `on_result` is called with each result once it is safely in results.jsonl. Raises InputError, before anything
    is written, for settings or data that cannot work; NonFiniteLoss if a training diverges.
    """
    config = given.resolved()
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = choose_precision(device, config.fp16, config.bf16)
    corpus = prepare_tokens(
        load_corpus(config.dataset, config.text_path), config.tokenizer, PRESETS[config.preset].vocab_size
    )
    check_data(config, corpus)
    description = describe(config, corpus.summary, precision.name)
    environment = describe_environment(device, precision.name)
    folder = choose_folder(config, description)
    finished = open_folder(folder, description, environment)
    comparison = Comparison(
        config=config,
        corpus=corpus,
        device=device,
        precision=precision,
        description=description,
        environment=environment,
        folder=folder,
        console=console,
    )
    announce(comparison)
    for seed, kind in product(config.seeds, config.mechanisms):
        if (kind, seed) in finished:
            console.print(f"✅ {kind.upper()} with seed {seed} is already in {folder}/results.jsonl")
        else:
            on_result(run_one(comparison, kind, seed))
    return folder


def check_data(config: ResolvedConfig, corpus: TokenizedCorpus) -> None:
    """Raises InputError if a split does not fill one block."""
    batches(config, corpus, seed=0)
    held_out(config, corpus)


def batches(config: ResolvedConfig, corpus: TokenizedCorpus, seed: int) -> BlockBatches:
    """Optimiser steps' worth of blocks: batch_size x gradient_accumulation_steps at a time."""
    rows = config.batch_size * config.gradient_accumulation_steps
    return BlockBatches(corpus.splits["train"].ids, config.sequence_length, rows, seed)


def held_out(config: ResolvedConfig, corpus: TokenizedCorpus, max_tokens: int | None = None) -> Any:
    limit = max_tokens or PRESETS[config.preset].eval_tokens
    return evaluation_batches(corpus.splits["validation"], config.sequence_length, config.batch_size, limit)


def num_steps(config: ResolvedConfig, train_batches: BlockBatches) -> int:
    """Whichever of --epochs and --max_steps ends first."""
    epochs = [] if config.epochs is None else [-(-config.epochs * train_batches.num_blocks // train_batches.batch_size)]
    return min(epochs + ([] if config.max_steps is None else [config.max_steps]))


def announce(comparison: Comparison) -> None:
    data = comparison.corpus.summary
    sizes = {split: counts["tokens"] for split, counts in data["splits"].items()}
    train_batches = batches(comparison.config, comparison.corpus, seed=0)
    steps = num_steps(comparison.config, train_batches)
    tokens = steps * train_batches.batch_size * comparison.config.sequence_length
    say = comparison.console.print
    say(f"Corpus     {data['dataset']}: {sizes['train']:,} training tokens, {sizes['validation']:,} held out")
    say(f"Split      {data['split_rule']}; {data['skipped']:,} files that are not text or empty left out")
    say(f"Budget     {steps:,} steps, {tokens:,} tokens for each mechanism and seed")
    environment = comparison.environment
    say(f"Machine    {environment['processor']}, {environment['threads']} threads, {comparison.precision.name}")
    say(f"Results    {comparison.folder}")


def run_one(comparison: Comparison, kind: str, seed: int) -> Result:
    """Train and evaluate one mechanism, and append its result."""
    console = comparison.console
    console.print(f"\n🏁 Testing {kind.upper()}...")
    console.print(f"Using {ATTENTION_TITLES[kind]}" + (f" (seed {seed})" if len(comparison.config.seeds) > 1 else ""))
    memory = PeakMemory(comparison.device)
    model = make_model(comparison, kind, seed)
    model.to(comparison.device)
    try:
        run = train_model(comparison, model, seed)
    except NonFiniteLoss as error:
        raise NonFiniteLoss(f"{kind}, seed {seed}: {error}") from None
    started = time.perf_counter()
    held = evaluate(comparison, model)
    eval_seconds = time.perf_counter() - started
    peak = memory.peak()
    length = comparison.config.sequence_length
    result = Result(
        attention_type=kind,
        seed=seed,
        train_loss=run.final_loss,
        eval_loss=held.loss,
        perplexity=held.perplexity,
        bits_per_byte=held.bits_per_byte,
        train_seconds=run.seconds,
        eval_seconds=eval_seconds,
        tokens_per_second=run.tokens / run.seconds,
        memory_allocated=peak.allocated,
        memory_reserved=peak.reserved,
        parameters=sum(p.numel() for p in model.parameters()),
        cache_bytes_per_token=sum(m.state_nbytes(1, length, CACHE_DTYPE) for m in mechanisms(model)) / length,
        train_tokens=run.tokens,
        eval_tokens=held.tokens,
        skipped_steps=run.skipped_steps,
        config=comparison.description | {"seeds": list(comparison.config.seeds)},
        environment=comparison.environment,
    )
    write_curve(comparison.folder, kind, seed, run.curve)
    append_result(comparison.folder, result)
    return result


def make_model(comparison: Comparison, kind: str, seed: int) -> nn.Module:
    """A GPT-2 of the preset's size; with --match parameters its MLP makes up for the mechanism's size."""
    config, preset, tokenizer = comparison.config, PRESETS[comparison.config.preset], comparison.corpus.tokenizer
    options = attention_options(kind, config)
    gpt2 = gpt2_config(
        hidden_size=preset.hidden_size,
        num_hidden_layers=preset.num_hidden_layers,
        num_attention_heads=preset.num_attention_heads,
        vocab_size=tokenizer.vocab_size,
        max_position_embeddings=config.sequence_length,
        eos_token_id=tokenizer.eos_id,
    )
    if config.match == "parameters":
        gpt2.n_inner = matched_intermediate_size(kind, gpt2, **options)
    return build_model(kind, gpt2, seed, **options)


def train_model(comparison: Comparison, model: nn.Module, seed: int) -> TrainingRun:
    config = comparison.config
    train_batches = batches(config, comparison.corpus, seed)
    plan = TrainingPlan(
        batch_at=train_batches.at,
        tokens_per_step=train_batches.batch_size * config.sequence_length,
        steps=num_steps(config, train_batches),
        accumulation=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        precision=comparison.precision,
        device=comparison.device,
    )
    with show_progress(comparison.console, plan.steps) as on_step:
        return train(model, plan, look=lambda: evaluate(comparison, model, LOOK_TOKENS).loss, on_step=on_step)


def evaluate(comparison: Comparison, model: nn.Module, max_tokens: int | None = None) -> HeldOutLoss:
    """Loss on the validation split; never on train."""
    scored = held_out(comparison.config, comparison.corpus, max_tokens)
    return held_out_loss(model, scored, comparison.device, comparison.precision.autocast())
