"""The main job: train and evaluate every mechanism under the same conditions, one result line each.

corpus -> tokens -> same batches in the same order -> model with one mechanism -> held-out loss -> results.jsonl
"""

import gc
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from mka.arms import Arm
from mka.config import ATTENTION_TITLES, OPTION_FLAGS, PRESETS, BenchmarkConfig, attention_options, layers_of
from mka.distributed import Ranks, lost_ranks_said, start_ranks
from mka.evaluation import HeldOutLoss, held_out_loss
from mka.experiments.afterwards import observe_models
from mka.experiments.comparison import Comparison, announce, prepare
from mka.experiments.folder import identity
from mka.experiments.launch import read_deepspeed
from mka.experiments.neighbours import Neighbours
from mka.experiments.progress import show_progress
from mka.experiments.tracking import check_tracker, tracked
from mka.models import (
    build_model,
    checkpoint_blocks,
    match_cache,
    matched_intermediate_size,
    mechanisms,
    model_flops,
    preset_config,
)
from mka.results import Result, append_result, write_curve
from mka.storage import replace_folder
from mka.training import (
    Checkpoints,
    NonFiniteLoss,
    OutOfMemory,
    Peak,
    PeakMemory,
    StepMemory,
    TrainingPlan,
    TrainingRun,
    activation_bytes,
    advice,
    is_out_of_memory,
    keep_freed_memory,
    train,
)

LOOK_TOKENS = 2**13
"""Held-out tokens of one look during training; the result at the end is taken over the preset's eval_tokens."""
CACHE_DTYPE = torch.bfloat16
BLOCK_DECIMALS = 6


def run_benchmark(given: BenchmarkConfig, console: Console, on_result: Callable[[Result], None]) -> Path:
    """Run what is missing of a comparison; returns its folder. Every rank of a launch calls it; the first one writes.

    `on_result` is called, on the first rank, with each result once it is safely in results.jsonl. Raises InputError,
    before anything is written, for settings or data that cannot work and for a folder that another run writes to;
    NonFiniteLoss if a training diverges; RankLost if another rank dies; Interrupted after a signal, when the checkpoint
    is written.
    """
    config = given.resolved()
    check_tracker(config.track)
    deepspeed = read_deepspeed(config)
    keep_freed_memory()
    ranks = start_ranks(config.ddp_timeout)
    with ExitStack() as held:
        with lost_ranks_said("between two trainings"):
            comparison = prepare(config, ranks, console, held, deepspeed)
            announce(comparison)
            for seed, arm in product(config.seeds, config.arms):
                result = result_of(comparison, arm, seed)
                if result is not None and ranks.is_main:
                    on_result(result)
            ranks.on_main(lambda: observe(comparison))
        with lost_ranks_said("at the end of the run"):
            ranks.part()
    return comparison.folder


def result_of(comparison: Comparison, arm: Arm, seed: int) -> Result | None:
    """That of one mechanism; None if it was there already. Collective."""
    if (arm.name, seed) not in comparison.finished:
        return run_one(comparison, arm, seed)
    comparison.console.print(f"✅ {arm.name.upper()} with seed {seed} is already in {comparison.folder}/results.jsonl")
    if comparison.ranks.is_main:  # left by a run that was killed just before it would have done this
        checkpoints_of(comparison, arm, seed).clear()
    return None


def observe(comparison: Comparison) -> None:
    """What is observed afterwards; the results are complete without it."""
    try:
        observe_models(comparison)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        comparison.console.print("Out of memory while costs and routers were observed; all results are there")


def run_one(comparison: Comparison, arm: Arm, seed: int) -> Result:
    """Train and evaluate one mechanism, and append its result. Collective."""
    console = comparison.console
    console.print(f"\n🏁 Testing {arm.name.upper()}...")
    seeds = comparison.config.seeds
    console.print(f"Using {ATTENTION_TITLES[arm.attention_type]}" + (f" (seed {seed})" if len(seeds) > 1 else ""))
    try:
        return train_and_score(comparison, arm, seed)
    except NonFiniteLoss as error:
        raise NonFiniteLoss(f"{arm.name}, seed {seed}: {error}") from None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failure = error.with_traceback(None)  # its frames hold what did not fit; Python 3.10 lets go of them below
    raise OutOfMemory(f"{arm.name}, seed {seed}: {out_of_memory(comparison, arm, seed, failure)}")


def train_and_score(comparison: Comparison, arm: Arm, seed: int) -> Result:
    config, ranks = comparison.config, comparison.ranks
    memory = PeakMemory(ranks.device)
    model = make_model(comparison, arm, seed)
    length = config.sequence_length
    parameters = sum(p.numel() for p in model.parameters())
    cache_bytes = sum(m.state_nbytes(1, length, CACHE_DTYPE) for m in mechanisms(model))
    checkpoints = checkpoints_of(comparison, arm, seed)
    neighbours = Neighbours(ranks)
    run = train_model(comparison, model, arm, seed, checkpoints)
    busy_cores = neighbours.busy_cores()
    started = time.perf_counter()
    held = evaluate(comparison, model)
    eval_seconds = time.perf_counter() - started
    if not math.isfinite(held.perplexity):  # every rank has the same sums
        raise NonFiniteLoss(f"the held-out loss is {held.loss:.6g}, and its perplexity no finite number: no result")
    peak = highest(ranks, memory.peak())
    result = Result(
        attention_type=arm.attention_type,
        variant=arm.variant,
        seed=seed,
        train_loss=run.final_loss,
        eval_loss=held.loss,
        perplexity=held.perplexity,
        bits_per_byte=held.bits_per_byte,
        eval_block_losses=[round(loss, BLOCK_DECIMALS) for loss in held.block_losses],
        train_seconds=run.seconds,
        eval_seconds=eval_seconds,
        tokens_per_second=run.tokens / run.seconds,
        memory_allocated=peak.allocated,
        memory_reserved=peak.reserved,
        parameters=parameters,
        cache_bytes_per_token=cache_bytes / length,
        flops_per_token=model_flops(model),
        train_tokens=run.tokens,
        eval_tokens=held.tokens,
        skipped_steps=run.skipped_steps,
        busy_cores=busy_cores,
        config=settings_of(comparison, arm),
        environment=comparison.environment,
    )
    ranks.on_main(lambda: keep(comparison, model, run, result, checkpoints))
    return result


def keep(comparison: Comparison, model: Any, run: TrainingRun, result: Result, checkpoints: Checkpoints) -> None:
    """What a training leaves: the model, its curve and, once these are there, its result."""
    export_model(comparison, model, result.file_name, checkpoints, len(run.losses))
    write_curve(comparison.folder, result.name, result.seed, run.curve)
    append_result(comparison.folder, result)
    checkpoints.clear()


def make_model(comparison: Comparison, arm: Arm, seed: int) -> nn.Module:
    """A GPT-2 of the preset's size; with --match its MLP makes up for what the mechanism costs, or its heads do."""
    config, tokenizer = comparison.config, comparison.corpus.tokenizer
    kind, options = arm.attention_type, attention_options(arm.attention_type, config) | dict(arm.options)
    preset = replace(PRESETS[config.preset], vocab_size=tokenizer.vocab_size, sequence_length=config.sequence_length)
    gpt2 = preset_config(preset, tokenizer.eos_id)
    if config.match == "cache":
        options = match_cache(kind, gpt2, config.num_groups, **options)
    elif config.match != "none":
        gpt2.n_inner = matched_intermediate_size(kind, gpt2, config.match, **options)
    model = build_model(gpt2, kind, seed, memory_layers=layers_of(kind, config), **options)
    if config.gradient_checkpointing:
        checkpoint_blocks(model)
    return model


def settings_of(comparison: Comparison, arm: Arm) -> dict[str, Any]:
    """What a row was made with: of the flags that not all mechanisms take, those that this one does."""
    shared = {name: value for name, value in comparison.description.items() if name not in OPTION_FLAGS}
    taken = attention_options(arm.attention_type, comparison.config) | dict(arm.options)
    if (layers := layers_of(arm.attention_type, comparison.config)) != "all":
        taken["memory_layers"] = layers
    return shared | taken | {"seeds": list(comparison.config.seeds)}


def export_model(comparison: Comparison, model: Any, name: str, checkpoints: Checkpoints, step: int) -> None:
    """The model after its last step, as a folder that `from_pretrained` loads: all of it with its manifest, or none."""

    def fill(folder: Path) -> dict[str, Any]:
        model.config.save_pretrained(folder)
        comparison.corpus.tokenizer.save(folder)
        checkpoints.export_weights(step, folder / "model.safetensors")
        return {}

    replace_folder(comparison.folder / "models" / name, fill)


def checkpoints_of(comparison: Comparison, arm: Arm, seed: int) -> Checkpoints:
    whose = identity(comparison.description) | {"attention_type": arm.name, "seed": seed}
    folder = comparison.folder / "checkpoints" / f"{arm.name}-seed{seed}"
    return Checkpoints(folder, whose, comparison.config.keep_checkpoints)


def train_model(comparison: Comparison, model: nn.Module, arm: Arm, seed: int, checkpoints: Checkpoints) -> TrainingRun:
    config, console = comparison.config, comparison.console
    batches = comparison.batches(seed)
    plan = TrainingPlan(
        batch_at=batches.at,
        steps=comparison.num_steps(),
        accumulation=comparison.accumulation,
        learning_rate=config.learning_rate,
        precision=comparison.precision,
        ranks=comparison.ranks,
        save_steps=config.save_steps,
        strategy=config.strategy,
        deepspeed=comparison.deepspeed,
    )
    tracker = config.track if comparison.ranks.is_main else "none"
    settings = {"attention_type": arm.name, "seed": seed}
    with (
        show_progress(console, plan.steps) as show,
        tracked(tracker, comparison.folder, f"{arm.name}-seed{seed}", settings) as track,
    ):

        def on_step(run: TrainingRun) -> None:
            show(run)
            track(run)

        return train(
            model,
            plan,
            look=lambda: evaluate(comparison, model, LOOK_TOKENS).loss,
            on_step=on_step,
            checkpoints=checkpoints,
            say=console.print,
        )


def out_of_memory(comparison: Comparison, arm: Arm, seed: int, error: BaseException) -> str:
    """The advice for a training that did not fit, from a model made anew and one row of it."""
    gc.collect()
    model = make_model(comparison, arm, seed)
    row = activation_bytes(model, comparison.config.sequence_length, comparison.precision.autocast())
    rows = comparison.rows_per_part
    strategy = comparison.environment["launch"]["strategy"].removeprefix("deepspeed ")
    memory = StepMemory.of(model, row, rows, strategy, comparison.ranks.count)
    return advice(error, memory, rows, comparison.accumulation)


def evaluate(comparison: Comparison, model: nn.Module, max_tokens: int | None = None) -> HeldOutLoss:
    """Loss on the validation split; never on train. Collective."""
    scored, ranks = comparison.held_out(max_tokens), comparison.ranks
    return held_out_loss(model, scored, ranks.device, comparison.precision.autocast(), ranks)


def highest(ranks: Ranks, peak: Peak) -> Peak:
    """The largest of all ranks; None where a rank could not measure. Collective."""
    peaks = ranks.gather(peak)
    return Peak(highest_or_none([p.allocated for p in peaks]), highest_or_none([p.reserved for p in peaks]))


def highest_or_none(values: list[int | None]) -> int | None:
    measured = [value for value in values if value is not None]
    return max(measured) if len(measured) == len(values) else None
