"""Everything a user can set, its defaults and its limits. No torch here.

BenchmarkConfig   what the command line gives (None: the preset's value)
Preset            a model size with the training budget that suits it
attention_options the keyword arguments one mechanism takes out of a BenchmarkConfig
"""

from dataclasses import dataclass, fields
from typing import Any, Literal

from mka.arms import STUDIES, Arm
from mka.limits import (
    LOCAL_WINDOW,
    LONGTERM_POSITIONS,
    MIXES,
    InputError,
    LongTermPositions,
    Mix,
    SessionDecay,
    check_at_least,
    check_heads,
    check_memory,
    check_sinks,
    unknown_name,
)

ATTENTION_TITLES = {
    "mha": "Multi-Head Attention",
    "mqa": "Multi-Query Attention",
    "gqa": "Grouped-Query Attention",
    "mla": "Multi-Head Latent Attention",
    "mka": "Memorized Key Attention",
    "fmka": "Fast Memorized Key Attention",
}
DATASETS = ("stdlib", "wikitext2", "wikitext103", "text")
STORES = ("device", "host", "disk")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A GPT-2 size (transformers' field names) and the training budget that suits it."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    tokenizer: str
    sequence_length: int
    batch_size: int
    max_steps: int
    learning_rate: float
    eval_tokens: int


PRESETS = {
    "quick": Preset(
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=8,
        vocab_size=8192,
        tokenizer="bpe",
        sequence_length=512,
        batch_size=4,
        max_steps=100,
        learning_rate=1e-3,
        eval_tokens=2**15,
    ),
    "small": Preset(
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=8,
        vocab_size=8192,
        tokenizer="bpe",
        sequence_length=512,
        batch_size=8,
        max_steps=2000,
        learning_rate=1e-3,
        eval_tokens=2**18,
    ),
    "gpt2": Preset(
        hidden_size=768,
        num_hidden_layers=12,
        num_attention_heads=12,
        vocab_size=50257,
        tokenizer="gpt2",
        sequence_length=1024,
        batch_size=8,
        max_steps=20000,
        learning_rate=6e-4,
        eval_tokens=2**18,
    ),
}


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Compare attention mechanisms in GPT-2-style language models trained from scratch."""

    attention_type: tuple[str, ...] = ()
    """Mechanisms to run: mha mqa gqa mla mka fmka. None given: all six, or those of the study."""
    study: str | None = None
    """A named set of trainings: small (what the README shows), or an ablation of mka and fmka: decay, levels, window,
    chunk, top_k, router, routing. Steps, seeds and match are the study's unless they are given."""
    preset: str = "quick"
    """Model size and budget: quick (5 M parameters), small (14 M) or gpt2 (124 M)."""
    dataset: str = "stdlib"
    """Corpus: stdlib (Python's standard library, offline), wikitext2, wikitext103 or text."""
    text_path: tuple[str, ...] = ()
    """Files or folders of your own; needs --dataset text."""
    tokenizer: str | None = None
    """bpe (trained on the train split), gpt2 (the genuine vocabulary, offline), or a name or folder."""
    sequence_length: int | None = None
    """Tokens a model sees at once."""
    batch_size: int | None = None
    """Sequences in one forward pass."""
    epochs: int | None = None
    """Passes over the train split. With --max_steps too, whichever ends first."""
    max_steps: int | None = None
    """Optimiser steps."""
    gradient_accumulation_steps: int = 1
    """Forward passes whose gradients make one optimiser step."""
    learning_rate: float | None = None
    """Peak of the schedule (warm-up, then cosine decay to a tenth)."""
    fp16: bool = False
    """float16 autocast with loss scaling."""
    bf16: bool = False
    """bfloat16 autocast; also the default where the processor has it."""
    seeds: tuple[int, ...] | None = None
    """Repeat everything with each seed; report mean and spread. None given: 0."""
    num_groups: int = 4
    """Key/value heads of gqa."""
    local_window: int | Literal["auto"] | None = "auto"
    """Tokens that a token sees, itself included, in every mechanism; None: the whole past. auto: 128 for mka and fmka,
    and no window for the others."""
    sink_tokens: int | None = None
    """First tokens of a row that every window sees; None: 4, or as many as a smaller window has room for."""
    mix: Mix = "joint"
    """mka reads its levels by one softmax (joint), or by one each, weighed by the router (routed)."""
    longterm_positions: LongTermPositions = "true"
    """Where mka reads retrieved keys, of a model with rotary positions: at their own distance (true), at the window's
    edge (clamped), or without any (none)."""
    chunk_size: int = 16
    """Tokens of one long-term chunk."""
    top_k: int = 4
    """Long-term chunks retrieved for each token; 0: no long-term level."""
    memory_layers: Literal["all"] | int | tuple[int, ...] = "all"
    """Layers that are mka or fmka: all, every n-th by a number n, or a list from 0; the others have the window and the
    sinks alone."""
    session_decay: SessionDecay = "learned"
    """Decay of the session average: learned, or a number between 0 and 1; None: no session level."""
    session_stride: int = 16
    """mka keeps the session average of every so many tokens as a slot to attend to; 1: of every token."""
    session_slots: int | None = 256
    """The latest slots that mka attends to; None: all of them."""
    match: Literal["auto", "none", "parameters", "flops", "cache"] = "auto"
    """Adjust the MLP so that every mechanism has the parameters of mha, or its FLOPs a token; or the size of the heads
    so that every cache is as large as that of gqa. auto: what the study holds equal; without a study, none."""
    output_dir: str | None = None
    """Folder of the results; default: runs/, named after the configuration."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """How several ranks share the work: ddp (each holds the model) or fsdp (FSDP2: each holds a part)."""
    deepspeed: bool = False
    """Train by DeepSpeed's ZeRO instead; started by deepspeed or torchrun."""
    deepspeed_config: str | None = None
    """DeepSpeed's JSON file; default: ZeRO stage 2."""
    gradient_checkpointing: bool = False
    """Compute each block's activations again for the backward pass instead of keeping them."""
    save_steps: int = 500
    """Optimiser steps between two checkpoints; 0: only at the end of a training and when it is interrupted."""
    keep_checkpoints: int = 2
    """Checkpoints of a training that are kept, the newest ones."""
    resume: bool = False
    """Go on with the run in --output_dir, and refuse to start a new one."""
    track: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Also send the curves to a tracker."""
    ddp_timeout: int = 1800
    """Seconds after which a rank that does not answer ends the job."""

    @property
    def arms(self) -> tuple[Arm, ...]:
        """What is trained, each once: the mechanisms in the order given, or those of the study."""
        if self.study is None:
            return tuple(Arm(kind) for kind in dict.fromkeys(self.attention_type or ATTENTION_TITLES))
        return tuple(
            arm for arm in STUDIES[self.study].arms if arm.attention_type in (self.attention_type or ATTENTION_TITLES)
        )

    def resolved(self) -> "ResolvedConfig":
        """The same configuration, checked, with the preset's values filled in. Raises InputError."""
        if self.preset not in PRESETS:
            raise unknown_name("preset", self.preset, PRESETS)
        preset = PRESETS[self.preset]
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("tokenizer", "sequence_length", "batch_size", "learning_rate"):
            if values[name] is None:
                values[name] = getattr(preset, name)
        if self.study is not None and self.study not in STUDIES:
            raise unknown_name("study", self.study, STUDIES)
        study = STUDIES[self.study] if self.study else None
        if self.epochs is None and self.max_steps is None:
            values["max_steps"] = study.max_steps if study else preset.max_steps
        if self.seeds is None:
            values["seeds"] = study.seeds if study else (0,)
        if self.match == "auto":
            values["match"] = study.match if study else "none"
        values["attention_type"] = tuple(dict.fromkeys(self.attention_type)) or tuple(
            dict.fromkeys(arm.attention_type for arm in self.arms)
        )
        config = ResolvedConfig(**values)
        config.check()
        return config


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(BenchmarkConfig):
    """A configuration that has passed its checks: nothing is left to the preset but the model's size."""

    seeds: tuple[int, ...] = (0,)
    match: Literal["none", "parameters", "flops", "cache"] = "none"
    tokenizer: str = PRESETS["quick"].tokenizer
    sequence_length: int = PRESETS["quick"].sequence_length
    batch_size: int = PRESETS["quick"].batch_size
    learning_rate: float = PRESETS["quick"].learning_rate

    def check(self) -> None:
        for kind in self.attention_type:
            if kind not in ATTENTION_TITLES:
                raise unknown_name("attention_type", kind, ATTENTION_TITLES)
        if not self.arms:
            raise InputError(
                f"attention_type is {' '.join(self.attention_type)}; study {self.study!r} has none of them"
            )
        if self.dataset not in DATASETS:
            raise unknown_name("dataset", self.dataset, DATASETS)
        if self.dataset == "text" and not self.text_path:
            raise InputError("--dataset text needs --text_path with one or more files or folders")
        if self.text_path and self.dataset != "text":
            raise InputError(f"text_path is {self.text_path[0]!r} but dataset is {self.dataset!r}; give --dataset text")
        if self.fp16 and self.bf16:
            raise InputError("--fp16 and --bf16 are both given; choose one")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise InputError(f"seeds is {list(self.seeds)}; give one or more different numbers from 0 up")
        for name in ("sequence_length", "batch_size", "epochs", "max_steps", "gradient_accumulation_steps"):
            check_at_least(name, getattr(self, name), 1)
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise InputError(f"learning_rate is {self.learning_rate}; it must be above 0")
        for name, least in (("save_steps", 0), ("keep_checkpoints", 1), ("ddp_timeout", 1)):
            check_at_least(name, getattr(self, name), least)
        if self.deepspeed and self.strategy == "fsdp":
            raise InputError("--deepspeed and --strategy fsdp are both given; choose one")
        if self.deepspeed_config is not None and not self.deepspeed:
            raise InputError(f"deepspeed_config is {self.deepspeed_config!r} without --deepspeed; give both")
        session = (self.session_decay, self.session_stride, self.session_slots)
        windows = [window_of(kind, self) for kind in self.attention_type]
        check_memory(next((w for w in windows if w is not None), None), self.chunk_size, self.top_k, *session)
        if self.mix not in MIXES:
            raise unknown_name("mix", self.mix, MIXES)
        if self.longterm_positions not in LONGTERM_POSITIONS:
            raise unknown_name("longterm_positions", self.longterm_positions, LONGTERM_POSITIONS)
        windowed = [window for window in windows if window is not None]
        for window in windowed or [None]:
            check_sinks(window, self.sink_tokens)
        if self.memory_layers != "all" and self.match != "none":
            raise InputError(
                f"memory_layers is {self.memory_layers} and match is {self.match!r}; sizes are matched for layers that "
                "are all alike: give --match none, or --memory_layers all"
            )
        preset = PRESETS[self.preset]
        kv_heads = self.num_groups if "gqa" in self.attention_type or self.match == "cache" else 1
        check_heads(preset.hidden_size, preset.num_attention_heads, kv_heads, "num_groups")


OPTION_FLAGS = (
    *("num_groups", "local_window", "sink_tokens", "mix", "chunk_size", "top_k", "longterm_positions"),
    *("session_decay", "session_stride", "session_slots", "memory_layers"),
)
"""Flags that one mechanism takes and another does not."""


def attention_options(kind: str, config: BenchmarkConfig) -> dict[str, object]:
    """Keyword arguments of `build_attention(kind, ...)` that the benchmark's flags set."""
    options: dict[str, object] = {}
    if (window := window_of(kind, config)) is not None or kind in ("mka", "fmka"):
        options["local_window"] = window
    if window is not None and config.sink_tokens is not None:
        options["sink_tokens"] = config.sink_tokens
    if kind == "gqa":
        options["num_kv_heads"] = config.num_groups
    if kind in ("mka", "fmka"):
        names = ["chunk_size", "top_k", "session_decay"]
        names += ["mix", "longterm_positions", "session_stride", "session_slots"] if kind == "mka" else []
        options |= {name: getattr(config, name) for name in names}
    return options


def layers_of(kind: str, config: BenchmarkConfig) -> Any:
    """The layers in which a mechanism with a memory stands; the others stand in all."""
    return config.memory_layers if kind in ("mka", "fmka") else "all"


def window_of(kind: str, config: BenchmarkConfig) -> int | None:
    """The window that a mechanism has with these flags."""
    if config.local_window == "auto":
        return LOCAL_WINDOW if kind in ("mka", "fmka") else None
    return config.local_window


@dataclass(frozen=True, kw_only=True)
class LongTermConfig:
    """Where the long-term memory of a model is kept while it reads."""

    longterm_store: Literal["device", "host", "disk"] = "device"
    """Where mka and fmka keep what they retrieve: on the device, in host memory, or in a memory-mapped file."""
    longterm_folder: str | None = None
    """Folder of that file, which has no name there and goes with the process; default: the system's temporary one."""
    longterm_gib: float | None = None
    """Limit of host memory or file, in GiB, all blocks together."""

    def __post_init__(self) -> None:
        if self.longterm_store not in STORES:
            raise unknown_name("longterm_store", self.longterm_store, STORES)
        if self.longterm_gib is not None and not 0 < self.longterm_gib < float("inf"):
            raise InputError(f"longterm_gib is {self.longterm_gib}; it must be above 0")
        if self.longterm_folder is not None and self.longterm_store != "disk":
            raise InputError(f"longterm_folder is {self.longterm_folder!r}; it is for longterm_store disk")
        if self.longterm_gib is not None and self.longterm_store == "device":
            raise InputError(f"longterm_gib is {self.longterm_gib}; it is for longterm_store host or disk")

    @property
    def is_special(self) -> bool:
        """Whether anything is not as usual."""
        return self.longterm_store != "device"
