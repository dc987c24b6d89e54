"""mka convert, adapt, generate and chat: give a pretrained model a memory, and write
text."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from mka.cli.output import complain
from mka.errors import InputError, check_at_least, check_utf8, unknown_name
from mka.memory.options import (
    LONGTERM_POSITIONS,
    MIX,
    MIXES,
    POSITIONS,
    SESSION_DECAY,
    SESSION_SLOTS,
    SESSION_STRIDE,
    LongTermPositions,
    Mix,
    SessionDecay,
    check_distance,
    check_memory,
    check_sinks,
)
from mka.record.config import AdaptConfig, GenerationOptions
from mka.record.mechanisms import CONVERTIBLE, MECHANISMS, listed


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Convert a pretrained model to another attention mechanism, and save it.

    With mka (the default), the model can read past its window.
    """

    model: str
    """Folder of a saved model, a name on the hub, or a .gguf file (needs the package
    gguf)."""
    output: str
    """Folder to write the model, its configuration and its tokenizer to; it must be new
    or empty."""
    attention_type: Annotated[
        str, tyro.conf.arg(help=f"The new attention mechanism: {listed(CONVERTIBLE, 'or')}.")
    ] = "mka"
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Data type of the written weights: float32, bfloat16 or float16; default: that of
    the model, or bfloat16 for a .gguf file."""
    local_window: int | None = 256
    """Tokens in the window of each token, itself included; None: the whole past."""
    sink_tokens: int | None = None
    """Number of initial tokens that every later token can see; None: 4, or fewer if the
    window is small."""
    mix: Mix = MIX
    """How mka combines its three levels: joint (one softmax over all) or routed (one
    softmax per level, weighted by the router)."""
    chunk_size: int = 8
    """Tokens per long-term chunk."""
    top_k: int = 32
    """Long-term chunks retrieved per token; 0: no long-term level."""
    longterm_positions: LongTermPositions = POSITIONS
    """Position of retrieved keys: true (their own distance), clamped (the window's
    edge) or none (no position)."""
    session_decay: SessionDecay = SESSION_DECAY
    """Decay of the session average: learned, or a number between 0 and 1; None: no
    session level. The average has no effect until it is trained."""
    session_stride: int = SESSION_STRIDE
    """mka: keep a session-average slot every N tokens (1: every token)."""
    session_slots: int | None = SESSION_SLOTS
    """mka: number of latest session slots to attend to; None: all of them."""
    memory_layers: Literal["all"] | int | tuple[int, ...] = "all"
    """Layers that get mka or fmka: all, n for every n-th layer, or a list of
    layer numbers from 0; the other layers have the window and the sinks only."""

    def __post_init__(self) -> None:
        check_utf8("output", self.output)
        if self.attention_type not in CONVERTIBLE:
            raise unknown_name("attention_type", self.attention_type, CONVERTIBLE)
        for name, allowed in (("mix", MIXES), ("longterm_positions", LONGTERM_POSITIONS)):
            if getattr(self, name) not in allowed:
                raise unknown_name(name, getattr(self, name), allowed)
        # Checked here, because `convert` only does so after the model has been loaded.
        session = (self.session_decay, self.session_stride, self.session_slots)
        check_memory(self.local_window, self.chunk_size, self.top_k, *session)
        check_distance(self.local_window, check_sinks(self.local_window, self.sink_tokens), None)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `mka.models.convert`."""
        # The heads of a pretrained model are given, so num_groups is not an option
        # here.
        flags = [flag for flag in MECHANISMS[self.attention_type].flags if flag != "num_groups"]
        return {flag: getattr(self, flag) for flag in flags} | {"memory_layers": self.memory_layers}


@dataclass(frozen=True, kw_only=True)
class SavedModel:
    """The model of a command."""

    model: str
    """Folder of a saved model, or a name on the hub; any causal model of
    transformers."""


@dataclass(frozen=True, kw_only=True)
class ModelChoice(GenerationOptions, SavedModel):
    """A saved model, and how it continues a text."""

    show_memory: bool = False
    """Print cache size and router shares."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig(ModelChoice):
    """Continue a text with a saved model."""

    prompt: str | None = None
    """Text to continue."""
    prompt_file: str | None = None
    """Read the prompt from this UTF-8 file."""
    prefill_chunk_size: int | None = None
    """Read the prompt in pieces of this many tokens, which limits peak memory; None:
    all at once."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_at_least("prefill_chunk_size", self.prefill_chunk_size, 1)
        # Both or none: either way it is not clear what to continue.
        if (self.prompt is None) == (self.prompt_file is None):
            raise InputError("give one of --prompt and --prompt_file")
        check_utf8("prompt", self.prompt)


@dataclass(frozen=True, kw_only=True)
class ChatConfig(ModelChoice):
    """Chat with a saved model, which reads each turn once.

    Each line of the input is a turn; the conversation ends with the input.
    """


def run_convert(config: ConvertConfig) -> int:
    """Write the converted model; print its parameters and its cache sizes. Returns
    0."""
    import torch

    from mka.models import convert
    from mka.models.account import account_of
    from mka.models.loading import load, load_gguf, new_folder, save

    # A folder that cannot be written to is refused before the model is loaded.
    output = new_folder(config.output)
    is_gguf = config.model.endswith(".gguf")
    model, tokenizer = (
        load_gguf(config.model, config.dtype or "bfloat16") if is_gguf else load(config.model)
    )
    # Cast before the conversion, so that new parameters get the same type.
    if config.dtype is not None:
        model = model.to(getattr(torch, config.dtype))
    converted = convert(model, config.attention_type, **config.options)
    save(converted, tokenizer, output)
    account = account_of(model, converted)
    print(f"kept: {account.kept:,} parameters; added: {account.added:,}")
    print(
        f"{account.layers} layers, {account.with_memory} of them with a memory; "
        f"window {account.local_window or 'none'}, sinks {account.sink_tokens}"
    )
    print(f"{'tokens':>8} {'own cache':>12} {'cache':>12} {'without chunks':>15}")
    for size in account.caches:
        sizes = f"{mib(size.own):>12} {mib(size.converted):>12} {mib(size.without_chunks):>15}"
        print(f"{size.tokens:>8,} {sizes}")
    print("without chunks: what stays on the device when chunks are kept in host memory or on disk")
    print(f"written: {config.output}")
    return 0


def mib(size: int) -> str:
    """A number of bytes, written in MiB."""
    return f"{size / 2**20:,.1f} MiB"


def run_adapt(config: AdaptConfig) -> int:
    """Train the memories of a converted model; returns 1 if the training diverges."""
    from mka.cli.benchmark import plain_console
    from mka.experiments import adapt_model
    from mka.training import NonFiniteLoss

    try:
        adapt_model(config, plain_console())
    except NonFiniteLoss as error:
        return complain("mka", error, 1)
    return 0


def conversation_of(config: ModelChoice, **streaming: Any) -> Any:
    """A conversation with the command's model, which prints its answers token by token.

    streaming: further options for transformers' TextStreamer.
    """
    from transformers import TextStreamer

    from mka.models.generation import Conversation
    from mka.models.loading import load

    model, tokenizer = load(config.model)
    streamer = TextStreamer(tokenizer, skip_prompt=True, **streaming)
    return Conversation(model, tokenizer, config, streamer)


def run_generate(config: GenerateConfig, say: Callable[[str], None] = print) -> int:
    """Print the prompt's continuation token by token; `say` gets a line on the memory
    if asked for.

    Returns 0. Raises InputError for a prompt's file that is not UTF-8 text.
    """
    prompt = config.prompt
    # Read before the model is loaded: a wrong path is reported at once.
    if config.prompt_file is not None:
        from mka.data.files import read_named_file

        prompt = read_named_file(Path(config.prompt_file), "prompt_file")
    from mka.models.generation import watched_routers

    conversation = conversation_of(config)
    size = config.prefill_chunk_size
    chunked = {} if size is None else {"prefill_chunk_size": size}
    # The prompt is within the watch too, because the routers work while it is read.
    with watched_routers(conversation.model) as shares:
        conversation.go_on(conversation.ids_of(prompt or "", is_first=True), **chunked)
    if config.show_memory:
        say(f"[{conversation.memory()}; {shares}]")
    return 0


def next_turn() -> str | None:
    """The next line of the input; None at its end.

    Raises InputError for a line that is not UTF-8; the one after it can be read. Raises
    OSError if there is no input.
    """
    if sys.stdin is None:
        raise OSError("the standard input is closed; give the turns there")
    try:
        if sys.stdin.isatty():
            line = input("> ")
            check_utf8("the turn", line)
            return line
        # Line by line in bytes: a decoder that fails would lose what it had read ahead.
        source = getattr(sys.stdin, "buffer", None)
        line = sys.stdin.readline() if source is None else source.readline().decode("utf-8-sig")
        return line.rstrip("\r\n") if line else None
    except UnicodeDecodeError as error:
        raise InputError(f"the turn is not UTF-8 (byte {error.start}); it was skipped") from error
    except EOFError:
        return None


def run_chat(
    config: ChatConfig,
    ask: Callable[[], str | None] = next_turn,
    say: Callable[[str], None] = print,
) -> int:
    """Answer each turn until there is none; empty ones are skipped.

    A turn that cannot be answered is reported on stderr, and the conversation
    continues. Returns 0, or 2 if there were turns and none could be answered.

    ask: returns the next turn; None: the conversation ends. say: gets a line on the
    memory after each answer, if asked for.
    """
    from mka.models.generation import watched_routers

    conversation = conversation_of(config, skip_special_tokens=True)
    answered = failed = dropped = 0
    while True:
        try:
            if (text := ask()) is None:
                return 2 if failed and not answered else 0
            if not text.strip():
                continue
            with watched_routers(conversation.model) as shares:
                conversation.tell(text)
        except InputError as error:
            failed += 1
            complain("mka", error, 2)
            continue
        answered += 1
        if (forgotten := conversation.dropped - dropped) > 0:
            dropped = conversation.dropped
            complain("mka", f"no positions left: dropped the oldest {forgotten} turn(s)", 0)
        if config.show_memory:
            say(f"[{conversation.memory()}; {shares}]")
