"""The main job: train and evaluate all mechanisms under the same conditions, one result
each.

corpus -> tokens -> the same batches in the same order -> a model with one mechanism
-> held-out loss -> results.jsonl
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

from mka.distributed import Ranks, lost_ranks_said, start_ranks
from mka.evaluation import HeldOutLoss, held_out_loss
from mka.experiments.budgets import match_cache, matched_intermediate_size, model_flops
from mka.experiments.comparison import Comparison, announce, prepare
from mka.experiments.costs import observe_models
from mka.experiments.environment import Neighbors, read_deepspeed
from mka.experiments.folder import identity
from mka.experiments.progress import check_tracker, show_progress, tracked
from mka.models import build_model, checkpoint_blocks, mechanisms, preset_config
from mka.record.config import PRESETS, BenchmarkConfig, attention_options, layers_of
from mka.record.mechanisms import MECHANISMS, OPTION_FLAGS
from mka.record.results import Result, RunFolder, append_result, run_name, write_curve
from mka.record.studies import Arm
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
"""Held-out tokens to score during a training; the result at the end uses the preset's
eval_tokens."""
CACHE_DTYPE = torch.bfloat16
"""The type that caches are counted in, whatever a training computes in."""
BLOCK_DECIMALS = 6
"""Decimals of a block's loss in results.jsonl."""


def run_benchmark(
    given: BenchmarkConfig, console: Console, on_result: Callable[[Result], None]
) -> Path:
    """Run the trainings that a comparison lacks; returns its folder. Collective.

    Every rank of a launch calls it; the first one writes. `on_result` is called, on the
    first rank, with each result once it is safely in results.jsonl.

    Raises InputError, before anything is written, for settings or data that cannot work
    and for a folder that another run is writing to; NonFiniteLoss if a training
    diverges; OutOfMemory if it does not fit; RankLost if another rank dies; Interrupted
    after a signal, when the checkpoint is written.
    """
    # All that can fail without the other ranks is done before they meet.
    config = given.resolved()
    check_tracker(config.track)
    deepspeed = read_deepspeed(config)
    keep_freed_memory()
    ranks = start_ranks(config.ddp_timeout)
    with ExitStack() as held:
        with lost_ranks_said("between two trainings"):
            comparison = prepare(config, ranks, console, held, deepspeed)
            announce(comparison)
            # Seed by seed: an interrupted run has compared all mechanisms with the
            # first seeds.
            for seed, arm in product(config.seeds, config.arms):
                result = result_of(comparison, arm, seed)
                if result is not None and ranks.is_main:
                    on_result(result)
            ranks.on_main(lambda: observe(comparison))
        with lost_ranks_said("at the end of the run"):
            ranks.part()
    return comparison.folder


def result_of(comparison: Comparison, arm: Arm, seed: int) -> Result | None:
    """Train one mechanism and return its result; None if there was one already.
    Collective."""
    if (arm.name, seed) not in comparison.finished:
        return run_one(comparison, arm, seed)
    comparison.console.print(
        f"✅ {arm.name.upper()} with seed {seed} is already in {comparison.folder}/results.jsonl"
    )
    # A run that was killed right after its result was written has left checkpoints.
    if comparison.ranks.is_main:
        checkpoints_of(comparison, arm, seed).clear()
    return None


def observe(comparison: Comparison) -> None:
    """Measure costs and routers; the results are complete even if memory runs out
    here."""
    try:
        observe_models(comparison)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        comparison.console.print(
            "Out of memory while measuring costs and routers; all results were saved"
        )


def run_one(comparison: Comparison, arm: Arm, seed: int) -> Result:
    """Train and evaluate one mechanism, and append its result. Collective.

    Raises NonFiniteLoss, naming mechanism and seed, if it diverges, and OutOfMemory if
    it does not fit.
    """
    console = comparison.console
    console.print(f"\n🏁 Testing {arm.name.upper()}...")
    seeds = comparison.config.seeds
    console.print(
        f"Using {MECHANISMS[arm.attention_type].title}"
        + (f" (seed {seed})" if len(seeds) > 1 else "")
    )
    try:
        return train_and_score(comparison, arm, seed)
    except NonFiniteLoss as error:
        raise NonFiniteLoss(f"{arm.name}, seed {seed}: {error}") from None
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # Without its traceback, whose frames hold what did not fit. The advice is
        # computed outside of this block, because it needs a model of its own.
        failure = error.with_traceback(None)
    raise OutOfMemory(f"{arm.name}, seed {seed}: {out_of_memory(comparison, arm, seed, failure)}")


def train_and_score(comparison: Comparison, arm: Arm, seed: int) -> Result:
    """Train one mechanism, score it on the held-out split, and save both.
    Collective."""
    config, ranks = comparison.config, comparison.ranks
    # Begun before the model is made, whose weights are part of what the mechanism
    # needs.
    memory = PeakMemory(ranks.device)
    model = make_model(comparison, arm, seed)
    length = config.sequence_length
    # Counted before the training, which may divide the parameters among the ranks.
    parameters = sum(p.numel() for p in model.parameters())
    cache_bytes = sum(m.state_nbytes(1, length, CACHE_DTYPE) for m in mechanisms(model))
    checkpoints = checkpoints_of(comparison, arm, seed)
    neighbors = Neighbors(ranks)
    run = train_model(comparison, model, arm, seed, checkpoints)
    busy_cores = neighbors.busy_cores()
    started = time.perf_counter()
    held = evaluate(comparison, model)
    eval_seconds = time.perf_counter() - started
    # All ranks have the same sums, so all of them raise or none does.
    if not math.isfinite(held.perplexity):
        raise NonFiniteLoss(
            f"the held-out loss is {held.loss:.6g} and its perplexity is not finite: no result"
        )
    peak = highest(ranks, memory.peak())
    result = Result(
        attention_type=arm.attention_type,
        variant=arm.variant,
        seed=seed,
        train_loss=run.final_loss,
        eval_loss=held.loss,
        perplexity=held.perplexity,
        bits_per_byte=held.bits_per_byte,
        # Rounded: a line of results.jsonl holds hundreds of them.
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


def keep(
    comparison: Comparison, model: Any, run: TrainingRun, result: Result, checkpoints: Checkpoints
) -> None:
    """Save what a training leaves behind: the model, its curve and its result."""
    # The result comes last, because it is what counts as finished: a kill before it
    # costs nothing but the steps since the last checkpoint, which is removed only
    # afterwards.
    export_model(comparison, model, result, checkpoints, len(run.losses))
    write_curve(comparison.folder, result.name, result.seed, run.curve)
    append_result(comparison.folder, result)
    checkpoints.clear()


def make_model(comparison: Comparison, arm: Arm, seed: int) -> nn.Module:
    """A GPT-2 of the preset's size with one mechanism; with --match, its MLP or heads
    are resized.

    Raises InputError if no size matches.
    """
    config, tokenizer = comparison.config, comparison.corpus.tokenizer
    kind, options = (
        arm.attention_type,
        attention_options(arm.attention_type, config) | dict(arm.options),
    )
    preset = replace(
        PRESETS[config.preset],
        vocab_size=tokenizer.vocab_size,
        sequence_length=config.sequence_length,
    )
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
    """The settings of a result: the shared ones, and the options that its mechanism
    takes."""
    shared = {
        name: value for name, value in comparison.description.items() if name not in OPTION_FLAGS
    }
    taken = attention_options(arm.attention_type, comparison.config) | dict(arm.options)
    if (layers := layers_of(arm.attention_type, comparison.config)) != "all":
        taken["memory_layers"] = layers
    return shared | taken | {"seeds": list(comparison.config.seeds)}


def export_model(
    comparison: Comparison, model: Any, result: Result, checkpoints: Checkpoints, step: int
) -> None:
    """Write the trained model as a folder that `from_pretrained` loads, whole or not at
    all."""

    def fill(folder: Path) -> dict[str, Any]:
        """Write configuration, tokenizer and weights; the manifest needs no details."""
        model.config.save_pretrained(folder)
        comparison.corpus.tokenizer.save(folder)
        # The weights of the last checkpoint are whole, while a sharded model holds only
        # a part.
        checkpoints.export_weights(step, folder / "model.safetensors")
        return {}

    replace_folder(RunFolder(comparison.folder).model(result.name, result.seed), fill)


def checkpoints_of(comparison: Comparison, arm: Arm, seed: int) -> Checkpoints:
    """The checkpoints of one training."""
    whose = identity(comparison.description) | {"attention_type": arm.name, "seed": seed}
    folder = RunFolder(comparison.folder).checkpoints(arm.name, seed)
    return Checkpoints(folder, whose, comparison.config.keep_checkpoints)


def train_model(
    comparison: Comparison, model: nn.Module, arm: Arm, seed: int, checkpoints: Checkpoints
) -> TrainingRun:
    """Train a model, with progress and tracking; resumes from its checkpoints.
    Collective."""
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
    # One rank sends the curves; they are the same on all of them.
    tracker = config.track if comparison.ranks.is_main else "none"
    settings = {"attention_type": arm.name, "seed": seed}
    with (
        show_progress(console, plan.steps) as show,
        tracked(tracker, comparison.folder, run_name(arm.name, seed), settings) as track,
    ):

        def on_step(run: TrainingRun) -> None:
            """Show progress, and send it to the tracker."""
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
    """The advice for a training that did not fit, measured on a new model with one
    row."""
    # Frees what the failed training still holds in cycles of references.
    gc.collect()
    model = make_model(comparison, arm, seed)
    row = activation_bytes(
        model, comparison.config.sequence_length, comparison.precision.autocast()
    )
    rows = comparison.rows_per_part
    strategy = comparison.environment["launch"]["strategy"].removeprefix("deepspeed ")
    memory = StepMemory.of(model, row, rows, strategy, comparison.ranks.count)
    return advice(error, memory, rows, comparison.accumulation)


def evaluate(
    comparison: Comparison, model: nn.Module, max_tokens: int | None = None
) -> HeldOutLoss:
    """The loss on the validation split; by default on the preset's eval_tokens.
    Collective."""
    scored, ranks = comparison.held_out(max_tokens), comparison.ranks
    return held_out_loss(model, scored, ranks.device, comparison.precision.autocast(), ranks)


def highest(ranks: Ranks, peak: Peak) -> Peak:
    """The largest peaks of all ranks; None where a rank could not measure.
    Collective."""
    peaks = ranks.gather(peak)
    allocated = highest_or_none([p.allocated for p in peaks])
    reserved = highest_or_none([p.reserved for p in peaks])
    return Peak(allocated, reserved)


def highest_or_none(values: list[int | None]) -> int | None:
    """The largest value; None if any of them is None."""
    measured = [value for value in values if value is not None]
    return max(measured) if len(measured) == len(values) else None
