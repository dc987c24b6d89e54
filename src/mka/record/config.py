"""The options of a benchmark and of an adaptation, with defaults and limits. No torch
here.

BenchmarkConfig    what the command line gives (None: the preset's value)
ResolvedConfig     the same, checked and filled in
Preset             a model size with the training budget that suits it
attention_options  the keyword arguments that one mechanism takes out of a
                   BenchmarkConfig
AdaptConfig        the options of `mka adapt`

The attribute docstrings of the options classes are the help texts of their flags.
"""

from dataclasses import dataclass, field, fields
from typing import Annotated, Any, Literal

from typing_extensions import Doc

from mka.errors import InputError, check_at_least, check_heads, check_utf8, unknown_name
from mka.memory.options import (
    CHUNK_SIZE,
    LOCAL_WINDOW,
    LONGTERM_POSITIONS,
    MIX,
    MIXES,
    POSITIONS,
    SESSION_DECAY,
    SESSION_SLOTS,
    SESSION_STRIDE,
    TOP_K,
    LongTermConfig,
    LongTermPositions,
    Mix,
    SessionDecay,
    check_memory,
    check_sinks,
)
from mka.record.mechanisms import MECHANISMS, OPTION_NAMES
from mka.record.studies import STUDIES, Arm

MOST_ROWS = 2**20
"""Rows of an optimizer step on one rank; more would take days to draw."""
# mka.data loads them; their names are here because checking a name must not load torch.
DATASETS = ("stdlib", "wikitext2", "wikitext103", "text")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """A GPT-2 size (transformers' field names) and the training budget that suits
    it."""

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


ATTENTION_TYPE_HELP = (
    f"Mechanisms to run: {', '.join(MECHANISMS)}. Default: all of them, or those of the study."
)


@dataclass(frozen=True, kw_only=True)
class BenchmarkConfig:
    """Compare attention mechanisms in GPT-2-style language models trained from
    scratch."""

    attention_type: Annotated[tuple[str, ...], Doc(ATTENTION_TYPE_HELP)] = ()
    study: str | None = None
    """A named set of trainings: small (see docs/results.md), routing, or an ablation of
    mka and fmka (decay, levels, window, chunk, top_k, router). It sets steps, seeds and
    match where they are not given."""
    preset: str = "quick"
    """Model size and training budget: quick (5 M parameters), small (14 M) or gpt2 (124
    M)."""
    dataset: str = "stdlib"
    """Corpus: stdlib (Python's standard library, offline), wikitext2, wikitext103 or
    text (the files of text_path)."""
    text_path: tuple[str, ...] = ()
    """Your own files or folders to train on; needs --dataset text."""
    tokenizer: str | None = None
    """Tokenizer: bpe (trained on the train split), gpt2 (the original vocabulary,
    offline), or a folder or a name on the hub; default: the preset's."""
    sequence_length: int | None = None
    """Tokens per training sequence; default: the preset's."""
    batch_size: int | None = None
    """Sequences per forward pass on each rank; default: the preset's."""
    epochs: int | None = None
    """Passes over the train split; if --max_steps is also given, a training ends at
    whichever comes first."""
    max_steps: int | None = None
    """Optimizer steps per training; default: the study's or the preset's, unless
    --epochs is given."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step."""
    learning_rate: float | None = None
    """Peak learning rate (warm-up, then cosine decay to a tenth); default: the
    preset's."""
    fp16: bool = False
    """Train with float16 autocast and loss scaling."""
    bf16: bool = False
    """Train with bfloat16 autocast; this is the default where the processor supports
    bfloat16."""
    seeds: tuple[int, ...] | None = None
    """Random seeds; everything is repeated with each, and mean and spread are reported.
    Default: the study's, or 0."""
    num_groups: int = 4
    """Number of key/value heads of gqa."""
    local_window: int | Literal["auto"] | None = "auto"
    """Tokens in the window of each token, itself included, in every mechanism; None:
    the whole past. auto: 128 for mka and fmka, and no window for the others."""
    sink_tokens: int | None = None
    """Number of initial tokens that every later token can see; None: 4, or fewer if the
    window is small."""
    mix: Mix = MIX
    """How mka combines its three levels: joint (one softmax over all) or routed (one
    softmax per level, weighted by the router)."""
    longterm_positions: LongTermPositions = POSITIONS
    """mka, in a model with rotary positions: position of retrieved keys: true (their
    own distance), clamped (the window's edge) or none (no position)."""
    chunk_size: int = CHUNK_SIZE
    """Tokens per long-term chunk."""
    top_k: int = TOP_K
    """Long-term chunks retrieved per token; 0: no long-term level."""
    memory_layers: Literal["all"] | int | tuple[int, ...] = "all"
    """Layers that are mka or fmka: all, n for every n-th layer, or a list of
    layer numbers from 0; the other layers have the window and the sinks only."""
    session_decay: SessionDecay = SESSION_DECAY
    """Decay of the session average: learned, or a number between 0 and 1; None: no
    session level."""
    session_stride: int = SESSION_STRIDE
    """mka: keep a session-average slot every N tokens (1: every token)."""
    session_slots: int | None = SESSION_SLOTS
    """mka: number of latest session slots to attend to; None: all of them."""
    match: Literal["auto", "none", "parameters", "flops", "cache"] = "auto"
    """What to make equal: parameters or flops (the MLP is resized until the model costs
    what mha does), cache (heads are resized until the cache is as large as that of
    gqa), or none. auto: the study's choice; without a study, none."""
    output_dir: str | None = None
    """Folder for the results; default: a folder in runs/ named after the
    configuration."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """How several ranks share the work: ddp (each holds the whole model) or fsdp
    (FSDP2: each holds a part)."""
    deepspeed: bool = False
    """Train with DeepSpeed's ZeRO instead of --strategy; start the command with
    deepspeed or torchrun."""
    deepspeed_config: str | None = None
    """DeepSpeed's JSON file; needs --deepspeed. Default: ZeRO stage 2."""
    gradient_checkpointing: bool = False
    """Recompute each block's activations in the backward pass, which saves memory."""
    save_steps: int = 500
    """Optimizer steps between two checkpoints; 0: only at the end of a training and
    when it is interrupted."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints to keep."""
    resume: bool = False
    """Require a run to resume in --output_dir (a run that is there is resumed in any
    case)."""
    track: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Also send the curves to a tracker: tensorboard, wandb or trackio."""
    ddp_timeout: int = 1800
    """Seconds to wait for a rank before aborting."""

    @property
    def arms(self) -> tuple[Arm, ...]:
        """What is trained, each once: the given mechanisms in order, or the arms of the
        study."""
        if self.study is None:
            return tuple(Arm(kind) for kind in dict.fromkeys(self.attention_type or MECHANISMS))
        # Mechanisms that are named together with a study choose among its arms.
        return tuple(
            arm
            for arm in STUDIES[self.study].arms
            if arm.attention_type in (self.attention_type or MECHANISMS)
        )

    def resolved(self) -> "ResolvedConfig":
        """The same configuration, checked, with the preset's values filled in.

        Raises InputError, naming the option, for a value that is not allowed.
        """
        if self.preset not in PRESETS:
            raise unknown_name("preset", self.preset, PRESETS)
        preset = PRESETS[self.preset]
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        for name in ("tokenizer", "sequence_length", "batch_size", "learning_rate"):
            if values[name] is None:
                values[name] = getattr(preset, name)
        # Checked before `arms` below looks it up.
        if self.study is not None and self.study not in STUDIES:
            raise unknown_name("study", self.study, STUDIES)
        study = STUDIES[self.study] if self.study else None
        # Epochs alone are a budget too: the preset's steps must not cut them short.
        if self.epochs is None and self.max_steps is None:
            values["max_steps"] = study.max_steps if study else preset.max_steps
        if self.seeds is None:
            values["seeds"] = study.seeds if study else (0,)
        if self.match == "auto":
            values["match"] = study.match if study else "none"
        # Given twice, a mechanism is still trained once.
        values["attention_type"] = tuple(dict.fromkeys(self.attention_type)) or tuple(
            dict.fromkeys(arm.attention_type for arm in self.arms)
        )
        config = ResolvedConfig(**values)
        config.check()
        return config


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(BenchmarkConfig):
    """A configuration that has passed its checks; the preset still decides the model's
    size."""

    # The same fields without None, so that a type checker knows that they are set.
    seeds: tuple[int, ...] = (0,)
    match: Literal["none", "parameters", "flops", "cache"] = "none"
    tokenizer: str = PRESETS["quick"].tokenizer
    sequence_length: int = PRESETS["quick"].sequence_length
    batch_size: int = PRESETS["quick"].batch_size
    learning_rate: float = PRESETS["quick"].learning_rate

    def check(self) -> None:
        """Raise InputError, naming option and value, unless the settings work
        together."""
        for kind in self.attention_type:
            if kind not in MECHANISMS:
                raise unknown_name("attention_type", kind, MECHANISMS)
        if not self.arms:
            raise InputError(
                f"attention_type is {' '.join(self.attention_type)}; study {self.study!r} has "
                "none of them"
            )
        check_utf8("output_dir", self.output_dir)
        if self.dataset not in DATASETS:
            raise unknown_name("dataset", self.dataset, DATASETS)
        if self.dataset == "text" and not self.text_path:
            raise InputError("--dataset text needs --text_path with one or more files or folders")
        if self.text_path and self.dataset != "text":
            raise InputError(
                f"text_path is {self.text_path[0]!r} but dataset is {self.dataset!r}; give "
                "--dataset text"
            )
        if self.fp16 and self.bf16:
            raise InputError("--fp16 and --bf16 are both given; choose one")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise InputError(f"seeds is {list(self.seeds)}; give distinct non-negative integers")
        check_at_least("seeds", max(self.seeds), 0)
        for name in (
            "sequence_length",
            "batch_size",
            "epochs",
            "max_steps",
            "gradient_accumulation_steps",
        ):
            check_at_least(name, getattr(self, name), 1)
        rows = self.batch_size * self.gradient_accumulation_steps
        if rows > MOST_ROWS:
            raise InputError(
                f"batch_size is {self.batch_size} and gradient_accumulation_steps "
                f"{self.gradient_accumulation_steps}; a step takes at most {MOST_ROWS:,} rows on "
                "each rank"
            )
        # Written so that NaN, with which every comparison is False, is refused too.
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise InputError(f"learning_rate is {self.learning_rate}; it must be above 0")
        for name, least in (("save_steps", 0), ("keep_checkpoints", 1), ("ddp_timeout", 1)):
            check_at_least(name, getattr(self, name), least)
        if self.deepspeed and self.strategy == "fsdp":
            raise InputError("--deepspeed and --strategy fsdp are both given; choose one")
        if self.deepspeed_config is not None and not self.deepspeed:
            raise InputError(
                f"deepspeed_config is {self.deepspeed_config!r} without --deepspeed; give both"
            )
        self.check_memories()
        preset = PRESETS[self.preset]
        # num_groups only matters where gqa runs, or where its cache is the size to
        # match; but a number below 1 is a mistake anywhere.
        matters = "gqa" in self.attention_type or self.match == "cache" or self.num_groups < 1
        kv_heads = self.num_groups if matters else 1
        check_heads(preset.hidden_size, preset.num_attention_heads, kv_heads, "num_groups")

    def check_memories(self) -> None:
        """Raise InputError, naming option and value, unless the options of the memories
        work together."""
        # Checked even if no mechanism in this run has a memory: a wrong flag is still a
        # mistake.
        session = (self.session_decay, self.session_stride, self.session_slots)
        windows = [window_of(kind, self) for kind in self.attention_type]
        check_memory(
            next((w for w in windows if w is not None), None), self.chunk_size, self.top_k, *session
        )
        if self.mix not in MIXES:
            raise unknown_name("mix", self.mix, MIXES)
        if self.longterm_positions not in LONGTERM_POSITIONS:
            raise unknown_name("longterm_positions", self.longterm_positions, LONGTERM_POSITIONS)
        # Each window on its own: mechanisms differ in theirs when local_window is auto.
        windowed = [window for window in windows if window is not None]
        for window in windowed or [None]:
            check_sinks(window, self.sink_tokens)
        layers = self.memory_layers
        for layer in layers if isinstance(layers, tuple) else ():
            check_at_least("memory_layers", layer, 0)
        if isinstance(layers, int):
            check_at_least("memory_layers", layers, 1)
        if self.memory_layers != "all" and self.match != "none":
            raise InputError(
                f"memory_layers is {self.memory_layers} and match is {self.match!r}; sizes can "
                "only be matched if all layers are alike: give --match none, or "
                "--memory_layers all"
            )


def attention_options(kind: str, config: BenchmarkConfig) -> dict[str, Any]:
    """Keyword arguments of `build_attention(kind, ...)` that the benchmark's flags
    set."""
    row, window = MECHANISMS[kind], window_of(kind, config)
    flags = [flag for flag in row.flags if flag != "memory_layers"]
    options = {OPTION_NAMES.get(flag, flag): getattr(config, flag) for flag in flags}
    if "local_window" in options:
        options["local_window"] = window
    # Not given, or without a window to keep them in: the mechanism's own default.
    if config.sink_tokens is None or window is None:
        options.pop("sink_tokens", None)
    # Without memories, the whole past is the default.
    if window is None and not row.has_memory:
        options.pop("local_window", None)
    return options


def layers_of(kind: str, config: BenchmarkConfig) -> Any:
    """The `memory_layers` of a mechanism: a mechanism without a memory is in all
    layers."""
    return config.memory_layers if MECHANISMS[kind].has_memory else "all"


def window_of(kind: str, config: BenchmarkConfig) -> int | None:
    """The window, in tokens, that a mechanism has with these flags; None: the whole
    past."""
    if config.local_window == "auto":
        return LOCAL_WINDOW if MECHANISMS[kind].has_memory else None
    return config.local_window


LEAST_TEMPERATURE = 0.001
"""The smallest temperature above 0."""


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How a saved model continues a text.

    Raises InputError for a value out of range.
    """

    max_new_tokens: int = 128
    """Maximum number of tokens to generate, per answer."""
    temperature: float = 0.0
    """0: greedy. Above 0: sampling; higher is more random."""
    seed: int = 0
    """Random seed for sampling."""
    bank: str | None = None
    """Folder of a bank (mka memory add); its documents are read as if they came before
    the text."""
    longterm: LongTermConfig = field(default_factory=LongTermConfig)
    """Where to keep the long-term memory."""

    def __post_init__(self) -> None:
        check_at_least("max_new_tokens", self.max_new_tokens, 1)
        check_at_least("seed", self.seed, 0)
        # Written so that NaN is refused too. Logits divided by less would overflow.
        heat = self.temperature
        if heat != 0 and not LEAST_TEMPERATURE <= heat < float("inf"):
            raise InputError(
                f"temperature is {heat}; it must be 0, or at least {LEAST_TEMPERATURE}"
            )


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """Train the memories of a converted model on a text, within minutes.

    The rest of the model does not change, unless LoRA is asked for. The loss before and
    after is printed, together with that of full attention and of window and sinks
    alone. After an interruption, the same command resumes.
    """

    model: str
    """Folder of a converted model (mka convert)."""
    output: str
    """Folder to write the model, its configuration and its tokenizer to; it must be new
    or empty. Checkpoints go into a folder next to it."""
    text_path: tuple[str, ...]
    """Files and folders of UTF-8 text to train on; a part of the text is held out."""
    objective: Literal["teacher", "text"] = "teacher"
    """What to learn to predict: teacher (what the same weights predict with full
    attention) or text (the text itself)."""
    lora_r: int | None = None
    """Also train LoRA of this rank on the projections q, k, v and o (needs the package
    peft); it is merged into the written weights."""
    sequence_length: int = 2048
    """Tokens per row; a row must reach beyond the model's window."""
    batch_size: int = 1
    """Rows per optimizer step, read one after the other."""
    max_steps: int = 100
    """Number of optimizer steps."""
    learning_rate: float = 5e-4
    """Peak learning rate of weight matrices; biases, gates and decays of the memories
    use ten times this rate."""
    seed: int = 0
    """Random seed for the order of rows and for LoRA's initial factors."""
    save_steps: int = 20
    """Optimizer steps between two checkpoints; 0: only when it is interrupted, and at
    the end."""

    def __post_init__(self) -> None:
        least = {
            "lora_r": 1,
            "sequence_length": 2,
            "batch_size": 1,
            "max_steps": 1,
            "seed": 0,
            "save_steps": 0,
        }
        check_utf8("output", self.output)
        for name, limit in least.items():
            check_at_least(name, getattr(self, name), limit)
        if not 0 < self.learning_rate < float("inf"):
            raise InputError(f"learning_rate is {self.learning_rate}; it must be above 0")
        if not self.text_path:
            raise InputError("text_path is empty; give one or more files or folders of UTF-8 text")
