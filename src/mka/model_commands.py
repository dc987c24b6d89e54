"""What `mka convert` and `mka adapt` take from their command lines."""

from dataclasses import dataclass
from typing import Any, Literal

from mka.limits import (
    LONGTERM_POSITIONS,
    MIXES,
    InputError,
    LongTermPositions,
    Mix,
    SessionDecay,
    check_at_least,
    check_distance,
    check_memory,
    check_sinks,
    unknown_name,
)

CONVERTIBLE = ("mha", "mqa", "gqa", "mka", "fmka")
"""What a pretrained model can become."""
OF_MEMORIES = ("chunk_size", "top_k", "session_decay")
OF_MKA = ("mix", "longterm_positions", "session_stride", "session_slots")


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Give a pretrained model another attention and save it, such as mka, which reads on beyond its window."""

    model: str
    """Folder of a saved model, a name on the hub, or a .gguf file (with the package gguf)."""
    output: str
    """Folder to write: model, configuration and tokenizer. It must be new or empty."""
    attention_type: str = "mka"
    """mha, mqa, gqa, mka or fmka."""
    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Of the weights that are written; default: the model's own, of a .gguf file bfloat16."""
    local_window: int | None = 256
    """Tokens that a token sees, itself included; None: the whole past."""
    sink_tokens: int | None = None
    """First tokens of a row that every window sees; None: 4, or as many as a smaller window has room for."""
    mix: Mix = "joint"
    """mka reads its levels by one softmax (joint), or by one each, weighed by the router (routed)."""
    chunk_size: int = 8
    """Tokens of one long-term chunk."""
    top_k: int = 32
    """Long-term chunks retrieved for each token; 0: no long-term level."""
    longterm_positions: LongTermPositions = "true"
    """Where retrieved keys stand: at their own distance (true), at the window's edge (clamped), or nowhere (none)."""
    session_decay: SessionDecay = "learned"
    """Decay of the session average, which is shut until it is trained: learned, or from 0 to 1; None: no session."""
    session_stride: int = 16
    """mka keeps the session average of every so many tokens as a slot to attend to."""
    session_slots: int | None = 256
    """The latest slots that mka attends to; None: all of them."""
    memory_layers: Literal["all"] | int | tuple[int, ...] = "all"
    """Layers that get mka or fmka: all, every n-th by a number n, or a list from 0; the others get the window alone."""

    def __post_init__(self) -> None:
        if self.attention_type not in CONVERTIBLE:
            raise unknown_name("attention_type", self.attention_type, CONVERTIBLE)
        for name, allowed in (("mix", MIXES), ("longterm_positions", LONGTERM_POSITIONS)):
            if getattr(self, name) not in allowed:
                raise unknown_name(name, getattr(self, name), allowed)
        session = (self.session_decay, self.session_stride, self.session_slots)
        check_memory(self.local_window, self.chunk_size, self.top_k, *session)
        check_distance(self.local_window, check_sinks(self.local_window, self.sink_tokens), None)

    @property
    def options(self) -> dict[str, Any]:
        """The keyword arguments of `mka.models.convert`."""
        names = ["local_window", "sink_tokens"]
        names += OF_MEMORIES if self.attention_type in ("mka", "fmka") else ()
        names += OF_MKA if self.attention_type == "mka" else ()
        return {name: getattr(self, name) for name in names} | {"memory_layers": self.memory_layers}


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """Train the memories of a converted model on a text, for minutes; the same command goes on after an interruption.

    The rest of the model stays as it is, unless LoRA is asked for. Losses before and after are said, beside those of
    full attention and of window and sinks alone.
    """

    model: str
    """Folder of a converted model (mka convert)."""
    output: str
    """Folder to write: model, configuration and tokenizer. It must be new or empty; checkpoints are beside it."""
    text_path: tuple[str, ...]
    """Files and folders of UTF-8 text to train on; a part of it is held out."""
    objective: Literal["teacher", "text"] = "teacher"
    """What is to be predicted: what the same weights predict with full attention (teacher), or the text itself."""
    lora_r: int | None = None
    """Also train LoRA of this rank on q, k, v and o (needs peft); it is merged into the weights that are written."""
    sequence_length: int = 2048
    """Tokens of a row; it must reach beyond the model's window."""
    batch_size: int = 1
    """Rows of an optimiser step, read one after the other."""
    max_steps: int = 100
    """Optimiser steps."""
    learning_rate: float = 5e-4
    """Of weights, after a warm-up; biases, gates and decays of the memories have ten times as much."""
    seed: int = 0
    """Of the order of rows, and of LoRA's first factors."""
    save_steps: int = 20
    """Optimiser steps between two checkpoints; 0: only when it is interrupted, and at the end."""

    def __post_init__(self) -> None:
        least = {"lora_r": 1, "sequence_length": 2, "batch_size": 1, "max_steps": 1, "seed": 0, "save_steps": 0}
        for name, limit in least.items():
            check_at_least(name, getattr(self, name), limit)
        if not 0 < self.learning_rate < float("inf"):
            raise InputError(f"learning_rate is {self.learning_rate}; it must be above 0")
        if not self.text_path:
            raise InputError("text_path is empty; give one or more files or folders of UTF-8 text")
