"""What a conversion keeps, what it adds, and what it costs."""

from dataclasses import dataclass
from typing import Any

from mka.models.build import mechanisms
from mka.models.families import head_dim_of, kv_heads_of, sliding_layers, window_of

LENGTHS = (1024, 8192, 32768)
"""Lengths of a row, in tokens, for which the size of its cache is reported."""


@dataclass(frozen=True)
class CacheSize:
    """Bytes of the cache of one row.

    Args:
        tokens: length of the row.
        own: bytes before the conversion.
        converted: bytes after the conversion.
        without_chunks: bytes after the conversion that stay on the device if chunks are
            kept in host memory or on disk.
    """

    tokens: int
    own: int
    converted: int
    without_chunks: int


@dataclass(frozen=True)
class Account:
    """What a conversion did to a model.

    Args:
        kept: parameters of the model before.
        added: parameters that are new.
        layers: all layers.
        with_memory: layers that retrieve chunks.
        local_window: w of the layers that are not sliding, in tokens. None: the whole
            past.
        sink_tokens: sinks of those layers.
        caches: sizes of caches for rows of several lengths.
    """

    kept: int
    added: int
    layers: int
    with_memory: int
    local_window: int | None
    sink_tokens: int
    caches: list[CacheSize]


def account_of(before: Any, after: Any) -> Account:
    """The account of a conversion, given the model before and after it."""
    kept, total = (sum(p.numel() for p in model.parameters()) for model in (before, after))
    layers, sliding = mechanisms(after), sliding_layers(after.config)
    remembering = [layer for layer in layers if layer.retrieves]
    # A sliding layer has the backbone's own window, which says nothing about the
    # conversion.
    first = next(layer for number, layer in enumerate(layers) if number not in sliding)
    caches = []
    for tokens in LENGTHS:
        new = sum(layer.state_nbytes(1, tokens) for layer in layers)
        # What is kept in blocks is read chunk by chunk, and can leave the device.
        stored = sum(
            entry.nbytes(tokens, 0)
            for layer in remembering
            for entry in layer.state_entries(after.dtype).values()
            if entry.block is not None
        )
        caches.append(CacheSize(tokens, own_nbytes(before, tokens), new, new - stored))
    window = (first.local_window, first.sink_tokens)
    return Account(kept, total - kept, len(layers), len(remembering), *window, caches)


def own_nbytes(model: Any, tokens: int) -> int:
    """Bytes of a model's own cache for one row of `tokens` tokens, its sliding windows
    included."""
    if ours := mechanisms(model):
        return sum(layer.state_nbytes(1, tokens) for layer in ours)
    # A model of transformers: keys and values of the tokens that each layer's window
    # keeps.
    config = model.config
    kept = [window_of(config)] * config.num_hidden_layers
    for number in sliding_layers(config):
        kept[number] = config.sliding_window
    size = 2 * kv_heads_of(config) * head_dim_of(config) * model.dtype.itemsize
    return sum(size * (tokens if window is None else min(tokens, window)) for window in kept)
