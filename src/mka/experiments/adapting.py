"""`mka adapt`: a converted model learns to use its memories, taught by its own full
attention."""

import importlib.util
import os
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from mka.attention.grouped import MemoryAttention
from mka.data import BlockBatches, TokenizedCorpus, evaluation_batches, load_corpus, prepare_tokens
from mka.distributed import Ranks, start_ranks
from mka.errors import InputError
from mka.experiments.progress import show_progress
from mka.models import convert, fingerprint, mechanisms, next_token_loss
from mka.models.loading import load, new_folder, save
from mka.models.weights import PRETRAINED
from mka.record.config import AdaptConfig
from mka.record.folders import claimed
from mka.training import Checkpoints, Teacher, TrainingPlan, choose_precision, train

HELD_OUT_ROWS = 4
"""Rows of the validation split that losses are measured on."""
VECTOR_RATE = 10.0
"""Factor of the learning rate for biases, gates and decays, which have further to
go."""
CHECKPOINTS = "checkpoints"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
# Options that may change between an interruption and the command that resumes.
NOT_IDENTITY = ("output", "save_steps")


def adapt_model(config: AdaptConfig, console: Console) -> None:
    """Adapt a model as configured, and write it.

    Raises InputError for settings that cannot work, NonFiniteLoss if the training
    diverges, and Interrupted after a signal, when the checkpoint is written.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}; mka adapt runs in one process: start "
            "it without torchrun"
        )
    # What can be checked is checked before the model is loaded.
    output = new_folder(config.output)
    if config.lora_r is not None and importlib.util.find_spec("peft") is None:
        raise InputError(
            f"lora_r is {config.lora_r}; LoRA needs the package peft: pip install peft"
        )
    work = output.with_name(f"{output.name}.{CHECKPOINTS}")
    model, tokenizer = load(config.model)
    memory = memory_of(model, config)
    # Resolved, because a folder may have the same name as a tokenizer, such as "gpt2".
    here = Path(config.model).resolve()
    spec = str(here) if here.is_dir() else config.model
    corpus = prepare_tokens(load_corpus("text", config.text_path), spec, 0)
    if corpus.tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"model is {config.model!r}; its tokenizer has {corpus.tokenizer.vocab_size:,} "
            f"tokens, but the model knows only {model.config.vocab_size:,}"
        )
    task = Task(config, model, corpus, memory, start_ranks())
    with claimed(work):
        save(task.run(Checkpoints(work, task.identity), console), tokenizer, output)
    Checkpoints(work, {}).clear()
    console.print(f"written: {config.output}")


def memory_of(model: Any, config: AdaptConfig) -> MemoryAttention:
    """The first layer with memories.

    Raises InputError if there is none, if it has no window, and if rows do not reach
    beyond its window and a chunk, because then there is nothing to learn.
    """
    memories = [layer for layer in mechanisms(model) if isinstance(layer, MemoryAttention)]
    if not memories:
        kind = getattr(model.config, "attention_type", model.config.model_type)
        raise InputError(
            f"model is {config.model!r}; its attention is {kind}, which has no memories; add "
            "them first: mka convert"
        )
    memory = memories[0]
    if memory.local_window is None:
        raise InputError(
            f"model is {config.model!r}; it has no local_window, so its memories are never needed"
        )
    # A chunk can only be retrieved once all of it has left the window.
    least = memory.local_window + memory.chunk_size
    if config.sequence_length <= least:
        raise InputError(
            f"sequence_length is {config.sequence_length}; it must be above the model's "
            f"local_window and chunk_size together, {least}"
        )
    return memory


class Task:
    """One adaptation: its texts, its teacher, and what it measures before and after."""

    def __init__(
        self,
        config: AdaptConfig,
        model: Any,
        corpus: TokenizedCorpus,
        memory: MemoryAttention,
        ranks: Ranks,
    ) -> None:
        self.config, self.model, self.ranks = config, model, ranks
        # What the reference models need to have in common with the adapted one.
        self.shape = {"num_kv_heads": memory.num_kv_heads, "sink_tokens": memory.sink_tokens}
        self.window = memory.local_window or 0
        self.dtype = model.dtype
        self.precision = choose_precision(model.device)
        length = config.sequence_length
        self.batches = BlockBatches(
            corpus.splits["train"].ids, length, config.batch_size, config.seed
        )
        limit = HELD_OUT_ROWS * length
        self.held_out = [
            rows for rows, _ in evaluation_batches(corpus.splits["validation"], length, 1, limit)
        ]
        settings = {
            name: value for name, value in asdict(config).items() if name not in NOT_IDENTITY
        }
        # The text itself identifies the adaptation, wherever its files are.
        settings["text_path"] = corpus.fingerprint
        self.identity = settings | {"model": fingerprint(model)}

    def run(self, checkpoints: Checkpoints, console: Console) -> Any:
        """Train the model and return it; prints what is trained, and the losses before
        and after.

        Raises NonFiniteLoss or Interrupted as `train` does.
        """
        config = self.config
        # Measured first, while the weights are those of the converted model.
        windowed = self.loss(
            convert(self.model, "gqa", **self.shape | {"local_window": self.window})
        )
        full = convert(self.model, "gqa", **self.shape | {"local_window": None, "sink_tokens": 0})
        gap = Gap(self.loss(full), windowed)
        console.print(
            f"held out: {len(self.held_out)} rows of {config.sequence_length:,} tokens, scored "
            f"from token {self.window:,} on"
        )
        console.print(
            f"full attention {gap.full:.4f}, window and sinks {gap.windowed:.4f} nats per token"
        )
        # Trained in float32 under autocast; the result is cast back to the model's own
        # type.
        self.model.float()
        adapter = self.choose_parameters(console)
        plan = TrainingPlan(
            batch_at=self.batches.at,
            steps=config.max_steps,
            accumulation=config.batch_size,
            learning_rate=config.learning_rate,
            precision=self.precision,
            ranks=self.ranks,
            save_steps=config.save_steps,
            objective=Teacher(full) if config.objective == "teacher" else next_token_loss,
            rate_of=lambda name: 1.0 if self.model.get_parameter(name).dim() >= 2 else VECTOR_RATE,
        )
        with show_progress(console, config.max_steps) as on_step:
            run = train(
                self.model, plan, lambda: self.loss(self.model), on_step, checkpoints, console.print
            )
        trained = self.model if adapter is None else adapter.merge_and_unload()
        trained = trained.to(self.dtype).eval().requires_grad_(True)
        # From the curve, because a training that resumed cannot measure the untrained
        # model.
        before = next(point.eval_loss for point in run.curve if point.eval_loss is not None)
        console.print(f"before {gap.share(before)}")
        console.print(f"after  {gap.share(self.loss(trained))}")
        return trained

    def choose_parameters(self, console: Console) -> Any:
        """Freeze all but what is trained; returns the PEFT model around it, or None."""
        self.model.requires_grad_(False)
        adapter = None if self.config.lora_r is None else self.with_lora(self.config.lora_r)
        count = {
            "memories": 0,
            "LoRA": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
        }
        # In the attention layers, all that the pretrained model did not have belongs to
        # memories.
        for layer in mechanisms(self.model):
            for name, parameter in layer.named_parameters():
                if not name.startswith(PRETRAINED):
                    parameter.requires_grad_(True)
                    count["memories"] += parameter.numel()
        console.print(
            f"trained: {count['memories']:,} parameters of memories, {count['LoRA']:,} of LoRA"
        )
        return adapter

    def with_lora(self, rank: int) -> Any:
        """PEFT's model around this one, with LoRA of this rank (arXiv 2106.09685).

        The projections of this model become LoRA's in place.
        """
        import peft

        # LoRA's initial factors are random.
        torch.manual_seed(self.config.seed)
        lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[*PROJECTIONS])
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning
            )
            return peft.get_peft_model(self.model, lora)

    @torch.no_grad()
    def loss(self, model: Any) -> float:
        """The mean loss on the held-out rows beyond the window, in nats per token."""
        model.eval()
        found = [self.late(model, rows.to(model.device)) for rows in self.held_out]
        return torch.cat(found).mean().item()

    def late(self, model: Any, rows: Tensor) -> Tensor:
        """The losses (N,) of tokens in rows (B, T + 1) whose past is longer than the
        window."""
        with self.precision.autocast():
            losses = next_token_loss(model, rows, reduction="none")
        return losses[:, self.window :].double().flatten()


class Gap:
    """The gap between window and sinks alone and full attention, as losses in nats per
    token."""

    def __init__(self, full: float, windowed: float) -> None:
        self.full, self.windowed = full, windowed

    def share(self, loss: float) -> str:
        """A loss, and how much of the gap it closes, in words."""
        if self.windowed <= self.full:
            return (
                f"{loss:.4f} nats per token (full attention is no better than the window on "
                "this text)"
            )
        return (
            f"{loss:.4f} nats per token: "
            f"{(self.windowed - loss) / (self.windowed - self.full):.3f} of the gap closed"
        )
