"""`mka adapt`: a converted model learns to use its memories, with its own full attention as teacher."""

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
from mka.experiments.progress import show_progress
from mka.folders import claimed
from mka.limits import InputError
from mka.loading import load, new_folder, save
from mka.model_commands import AdaptConfig
from mka.models import convert, fingerprint, mechanisms, next_token_loss
from mka.models.weights import PRETRAINED
from mka.training import Checkpoints, Teacher, TrainingPlan, choose_precision, train

HELD_OUT_ROWS = 4
VECTOR_RATE = 10.0
"""Times the learning rate for biases, gates and decays: they have further to go than weights do."""
CHECKPOINTS = "checkpoints"
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
NOT_IDENTITY = ("output", "save_steps")


def adapt_model(config: AdaptConfig, console: Console) -> None:
    """Train, and write the adapted model. Raises InputError; Interrupted after a signal, with a checkpoint written."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise InputError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}; mka adapt runs in one process: start it without torchrun"
        )
    output = new_folder(config.output)
    if config.lora_r is not None and importlib.util.find_spec("peft") is None:
        raise InputError(f"lora_r is {config.lora_r}; LoRA needs the package peft: pip install peft")
    work = output.with_name(f"{output.name}.{CHECKPOINTS}")
    model, tokenizer = load(config.model)
    memory = memory_of(model, config)
    here = Path(config.model).resolve()  # a folder may be called as a tokenizer is, "gpt2"
    spec = str(here) if here.is_dir() else config.model
    corpus = prepare_tokens(load_corpus("text", config.text_path), spec, 0)
    if corpus.tokenizer.vocab_size > model.config.vocab_size:
        raise InputError(
            f"model is {config.model!r}; its tokenizer has {corpus.tokenizer.vocab_size:,} tokens and it knows "
            f"{model.config.vocab_size:,}"
        )
    task = Task(config, model, corpus, memory, start_ranks())
    with claimed(work):
        save(task.run(Checkpoints(work, task.identity), console), tokenizer, output)
    Checkpoints(work, {}).clear()
    console.print(f"written: {config.output}")


def memory_of(model: Any, config: AdaptConfig) -> MemoryAttention:
    """The first layer that has one, beyond whose window there is something to learn. Raises InputError where there is
    none, and for rows that do not reach so far."""
    memories = [layer for layer in mechanisms(model) if isinstance(layer, MemoryAttention)]
    if not memories:
        kind = getattr(model.config, "attention_type", model.config.model_type)
        raise InputError(
            f"model is {config.model!r}; its attention is {kind}, which has no memories; make some first: mka convert"
        )
    memory = memories[0]
    if memory.local_window is None:
        raise InputError(
            f"model is {config.model!r}; its memories have no local_window beyond which they would be needed"
        )
    least = memory.local_window + memory.chunk_size
    if config.sequence_length <= least:
        raise InputError(
            f"sequence_length is {config.sequence_length}; it must be above the model's local_window and chunk_size "
            f"together, {least}"
        )
    return memory


class Task:
    """One adaptation: its texts, its teacher, and what is measured before and after."""

    def __init__(
        self, config: AdaptConfig, model: Any, corpus: TokenizedCorpus, memory: MemoryAttention, ranks: Ranks
    ) -> None:
        self.config, self.model, self.ranks = config, model, ranks
        self.shape = {"num_kv_heads": memory.num_kv_heads, "sink_tokens": memory.sink_tokens}
        self.window = memory.local_window or 0
        self.dtype = model.dtype
        self.precision = choose_precision(model.device)
        length = config.sequence_length
        self.batches = BlockBatches(corpus.splits["train"].ids, length, config.batch_size, config.seed)
        limit = HELD_OUT_ROWS * length
        self.held_out = [rows for rows, _ in evaluation_batches(corpus.splits["validation"], length, 1, limit)]
        settings = {name: value for name, value in asdict(config).items() if name not in NOT_IDENTITY}
        settings["text_path"] = corpus.fingerprint
        self.identity = settings | {"model": fingerprint(model)}

    def run(self, checkpoints: Checkpoints, console: Console) -> Any:
        """The model, trained; it says what is trained, and the losses before and after."""
        config = self.config
        windowed = self.loss(convert(self.model, "gqa", **self.shape | {"local_window": self.window}))
        full = convert(self.model, "gqa", **self.shape | {"local_window": None, "sink_tokens": 0})
        gap = Gap(self.loss(full), windowed)
        console.print(
            f"held out: {len(self.held_out)} rows of {config.sequence_length:,} tokens, from token {self.window:,} on"
        )
        console.print(f"full attention {gap.full:.4f}, window and sinks {gap.windowed:.4f} nats per token")
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
            run = train(self.model, plan, lambda: self.loss(self.model), on_step, checkpoints, console.print)
        trained = self.model if adapter is None else adapter.merge_and_unload()
        trained = trained.to(self.dtype).eval().requires_grad_(True)
        before = next(point.eval_loss for point in run.curve if point.eval_loss is not None)
        console.print(f"before {gap.share(before)}")
        console.print(f"after  {gap.share(self.loss(trained))}")
        return trained

    def choose_parameters(self, console: Console) -> Any:
        """Freeze all but what is trained; the PEFT model around it, or None."""
        self.model.requires_grad_(False)
        adapter = None if self.config.lora_r is None else self.with_lora(self.config.lora_r)
        count = {"memories": 0, "LoRA": sum(p.numel() for p in self.model.parameters() if p.requires_grad)}
        for layer in mechanisms(self.model):
            for name, parameter in layer.named_parameters():
                if not name.startswith(PRETRAINED):
                    parameter.requires_grad_(True)
                    count["memories"] += parameter.numel()
        console.print(f"trained: {count['memories']:,} parameters of memories, {count['LoRA']:,} of LoRA")
        return adapter

    def with_lora(self, rank: int) -> Any:
        """PEFT's model around this one, whose projections become LoRA's in place (arXiv 2106.09685)."""
        import peft

        torch.manual_seed(self.config.seed)  # LoRA's first factors are drawn
        lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[*PROJECTIONS])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            return peft.get_peft_model(self.model, lora)

    @torch.no_grad()
    def loss(self, model: Any) -> float:
        """Nats per token of the held-out rows, beyond the window."""
        model.eval()
        found = [self.late(model, rows.to(model.device)) for rows in self.held_out]
        return torch.cat(found).mean().item()

    def late(self, model: Any, rows: Tensor) -> Tensor:
        with self.precision.autocast():
            losses = next_token_loss(model, rows, reduction="none")
        return losses[:, self.window :].double().flatten()


class Gap:
    """What lies between window and sinks and full attention, in nats per token."""

    def __init__(self, full: float, windowed: float) -> None:
        self.full, self.windowed = full, windowed

    def share(self, loss: float) -> str:
        if self.windowed <= self.full:
            return f"{loss:.4f} nats per token (full attention is no better than the window on this text)"
        return (
            f"{loss:.4f} nats per token: {(self.windowed - loss) / (self.windowed - self.full):.3f} of the gap closed"
        )
