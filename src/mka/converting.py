"""`mka convert`: a pretrained model with another attention, as a folder."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from mka.data.hub import first_line
from mka.limits import InputError
from mka.loading import load, new_folder, save
from mka.model_commands import ConvertConfig
from mka.models import convert, mechanisms
from mka.models.families import head_dim_of, kv_heads_of, sliding_layers, window_of

Say = Callable[[str], None]
LENGTHS = (1024, 8192, 32768)
"""Tokens for which the cost of a cache is said."""


def convert_model(config: ConvertConfig, say: Say) -> None:
    """Write the converted model, and say what was kept, what was added and what its cache costs. Raises InputError."""
    output = new_folder(config.output)
    model, tokenizer = read_gguf(config) if config.model.endswith(".gguf") else load(config.model)
    if config.dtype is not None:
        model = model.to(getattr(torch, config.dtype))
    converted = convert(model, config.attention_type, **config.options)
    save(converted, tokenizer, output)
    for line in account(model, converted):
        say(line)
    say(f"written: {config.output}")


def read_gguf(config: ConvertConfig) -> tuple[Any, Any]:
    """Model and tokenizer of a .gguf file, its weights as plain numbers."""
    path = Path(config.model)
    if not path.is_file():
        raise InputError(f"model is {config.model!r}; there is no such file")
    if importlib.util.find_spec("gguf") is None:
        raise InputError(f"model is {config.model!r}; to read it the package gguf is needed: pip install gguf")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    dtype = getattr(torch, config.dtype or "bfloat16")
    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
        return model.eval(), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except Exception as error:  # a foreign file can fail in every way that its libraries know
        raise InputError(f"model is {config.model!r}; transformers cannot read it: {first_line(error)}") from error


def account(before: Any, after: Any) -> list[str]:
    """What was kept, what was added, and the bytes of a cache, against those of the model's own."""
    kept, total = (sum(p.numel() for p in model.parameters()) for model in (before, after))
    layers = mechanisms(after)
    remembering = [layer for layer in layers if layer.retrieves]
    sliding = sliding_layers(after.config)
    first = next(layer for number, layer in enumerate(layers) if number not in sliding)
    lines = [
        f"kept: {kept:,} parameters; added: {total - kept:,}",
        f"{len(layers)} layers, {len(remembering)} of them with a memory; window {first.local_window or 'none'}, "
        f"sinks {first.sink_tokens}",
        f"{'tokens':>8} {'own cache':>12} {'cache':>12} {'beside chunks':>14}",
    ]
    for tokens in LENGTHS:
        own = own_nbytes(before, tokens)
        new = sum(layer.state_nbytes(1, tokens) for layer in layers)
        stored = sum(
            entry.nbytes(tokens, 0)
            for layer in remembering
            for entry in layer.state_entries(after.dtype).values()
            if entry.block is not None
        )
        lines.append(f"{tokens:>8,} {mib(own):>12} {mib(new):>12} {mib(new - stored):>14}")
    lines.append("beside chunks: what stays on the device where chunks are kept in host memory or on disk")
    return lines


def own_nbytes(model: Any, tokens: int) -> int:
    """Bytes of a model's own cache of one row, its windows taken into account."""
    if ours := mechanisms(model):
        return sum(layer.state_nbytes(1, tokens) for layer in ours)
    config = model.config
    kept = [window_of(config)] * config.num_hidden_layers
    for number in sliding_layers(config):
        kept[number] = config.sliding_window
    size = 2 * kv_heads_of(config) * head_dim_of(config) * model.dtype.itemsize
    return sum(size * (tokens if window is None else min(tokens, window)) for window in kept)


def mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
