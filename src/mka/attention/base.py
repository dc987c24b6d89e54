"""The contract that every mechanism fulfills (docs/attention.md)."""

import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from mka.errors import InputError, check_heads, check_whole
from mka.memory.entry import Entry
from mka.memory.local import token_index
from mka.memory.options import check_distance, check_sinks
from mka.memory.places import LongTerm
from mka.memory.router import Router
from mka.memory.state import State
from mka.ops.attend import Window
from mka.ops.packing import packing, pieces
from mka.ops.rotary import RotaryEmbedding

Bias = bool | Literal["qkv"]
"""Which projections have a bias: all, none, or all but the output projection."""


class CausalAttention(nn.Module, ABC):
    """Causal attention over x (B, T, C): what all mechanisms have in common.

        y, state = attn(x, positions=None, valid=None, state=None)

    A mechanism implements `mix` on rows without padding, the stores of its state
    (`state_entries`), and two cost functions (`num_parameters`, `flops_per_token`).

    Args:
        hidden_size: C, channels of x.
        num_heads: H, query heads.
        num_kv_heads: G, key/value heads; it must divide num_heads.
        local_window: w, the latest tokens that a token attends to, itself included.
            None: all.
        head_dim: D, channels per head. None: C / H, so that H must divide C.
        bias: which projections have a bias: True (all), False (none), or "qkv" (all but
            the output projection).
        rotary: the rotary embedding of queries and keys. None: `positions` are ignored.
        sink_tokens: first tokens of a row that every later token attends to, in
            addition to its window. Default: None, 4 or as many as fit; none without a
            window.
        max_distance: the largest distance, in tokens, between a query and a sink under
            rotary positions: sinks further away are read as if they were this far.
            Default: None, no limit.

    Raises ValueError for heads that do not divide, for sizes below 1, for sinks that do
    not fit the window, and for a max_distance below local_window + sink_tokens.
    """

    shows_weights = True
    """Whether `output_attentions` can return its weights: it cannot where several
    softmaxes are mixed, because a token then has more than one weight per head."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        local_window: int | None,
        head_dim: int | None,
        bias: Bias,
        rotary: RotaryEmbedding | None,
        sink_tokens: int | None = None,
        max_distance: int | None = None,
    ) -> None:
        super().__init__()
        check_heads(
            hidden_size if head_dim is None else num_heads * head_dim, num_heads, num_kv_heads
        )
        check_whole("head_dim", head_dim, 1)
        check_whole("local_window", local_window, 1)
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim or hidden_size // num_heads
        # With a head_dim of its own, the heads together need not be as wide as x.
        self.inner_size = num_heads * self.head_dim
        self.local_window = local_window
        self.sink_tokens = check_sinks(local_window, sink_tokens)
        self.max_distance = check_distance(local_window, self.sink_tokens, max_distance)
        self.bias = bias
        self.rotary = rotary

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        valid: Tensor | None = None,
        state: State | None = None,
        documents: Tensor | None = None,
    ) -> tuple[Tensor, State | None]:
        """Attend; outputs at padding are zeros.

        Args:
            x: (B, T, C), normalized by the layer around it.
            positions: (B, T) or (T,), the position of each valid token in its own row;
                only rotary embeddings read them. Default: None, valid tokens counted
                from 0, those of the state included.
            valid: (B, T) bool, False for padding, which may be anywhere in a row.
                Default: None, all valid.
            state: from `initial_state` or an earlier call; x continues where that call
                ended. Default: None, nothing comes before and nothing is kept.
            documents: (B, T) whole numbers, equal for the tokens of one document of a
                row, which must be adjacent. Each document is read as a row of its own.
                Default: None, every row is one document.

        Returns y (B, T, C) and the state to continue with, None if none was given.

        Raises ValueError for a state of another mechanism, of other options or with
        another number of rows, for a state without room, and for documents together
        with a state.
        """
        batch, tokens = x.shape[:2]
        if not tokens:
            return torch.zeros_like(x), state
        if documents is not None:
            if state is not None:
                raise InputError(
                    "documents are packed in a row, and there is a state; a state continues one "
                    "document"
                )
            return self.apart(x, positions, valid, documents), None
        if state is not None:
            # Before anything is read: a state that does not fit, or has no room, is
            # left unchanged.
            state.check(type(self).__name__, self.form_of_state, batch)
            counts = [tokens] * batch if valid is None else valid.sum(1).tolist()
            state.begin(counts)
            # A mask that hides nothing would only cost the sorting below.
            if counts == [tokens] * batch:
                valid = None
        if self.rotary is None:
            positions = None
        x = bounded(x)
        # Padding moves to the end of each row, so that no mechanism has to know about
        # it: what is causal cannot see it there.
        rows = None if valid is None else packing(valid)
        if rows is not None:
            x = rows.pack(x)
            positions = None if positions is None else rows.pack(positions.expand(x.shape[:2]))
        # Counted from 0 among valid tokens, which is right only once padding is gone.
        if self.rotary is not None and positions is None:
            positions = token_index(x, state)
        y = self.mix(x, positions, state)
        if state is not None:
            state.end()
        return y if rows is None else rows.unpack(y), state

    def apart(
        self, x: Tensor, positions: Tensor | None, valid: Tensor | None, documents: Tensor
    ) -> Tensor:
        """y (B, T, C) of rows in which several documents are packed; see `forward`."""
        # One row per document, so that no level of no mechanism can mix two of them.
        # `where` are token numbers over all rows, `there` marks the columns that hold a
        # token.
        rows, tokens = x.flatten(0, 1), x.shape[:2]
        places = None if positions is None else positions.expand(tokens).flatten()
        y = torch.zeros_like(rows)
        for where, there in pieces(documents, valid):
            # Documents of similar length share a call; zeros fill up the shorter ones.
            part = rows[where].masked_fill(~there.unsqueeze(2), 0)
            read, _ = self.forward(part, None if places is None else places[where])
            y = y.to(read.dtype).index_put((where[there],), read[there])
        return y.view(x.shape)

    @abstractmethod
    def mix(self, x: Tensor, positions: Tensor | None, state: State | None) -> Tensor:
        """The mechanism itself: x (B, T, C) -> y (B, T, C).

        Args:
            x: rows without padding, or with padding after the last token only.
            positions: (T,) or (B or 1, T); None without rotary embeddings.
            state: to read from and to write to. None: this call is the whole row.
        """

    @abstractmethod
    def state_entries(self, dtype: torch.dtype) -> dict[str, Entry]:
        """The stores of a state by name: keys and values in `dtype`, sums and means in
        float32 or better."""

    def initial_state(
        self,
        batch_size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        reversible: int = 0,
        longterm: LongTerm | None = None,
    ) -> State:
        """An empty state.

        Args:
            batch_size: B, the number of rows.
            dtype: of keys and values. Default: None, that of the weights.
            device: where the stores are. Default: None, that of the weights.
            reversible: how many of its latest tokens a row can take back
                (`State.crop`), if the state is bounded. Default: 0.
            longterm: where chunks are kept, and the bank that is remembered. Default:
                None, on the device, no bank.

        Raises ValueError for a longterm other than the default if the mechanism
        retrieves nothing.
        """
        entries = self.state_of(dtype or self.own_dtype, longterm)
        # An option without an effect is refused: whoever gave it expects one.
        if longterm is not None and longterm.is_special and not self.retrieves:
            raise InputError(
                f"{longterm.asked_for}; this {type(self).__name__} retrieves nothing; "
                "allowed: longterm_store device, no bank"
            )
        return State(
            type(self).__name__,
            entries,
            batch_size,
            device or self.own_device,
            reversible,
            longterm,
        )

    def state_of(self, dtype: torch.dtype, longterm: LongTerm | None) -> dict[str, Entry]:
        """The stores of a state whose long-term memory is kept as `longterm` says."""
        return self.state_entries(dtype)

    @property
    def retrieves(self) -> bool:
        """Whether it reads chunks of the past."""
        # Stores that are kept chunk by chunk hold what is retrieved, and nothing else
        # does.
        return any(entry.block is not None for entry in self.form_of_state.values())

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """Parameters, computed from the configuration."""

    @abstractmethod
    def flops_per_token(self, context: int) -> int:
        """FLOPs of the matrix products (2 per multiply-add) in the forward pass of one
        token.

        The token is the last of `context` tokens; keys and values are computed once per
        token.
        """

    def state_nbytes(
        self,
        batch_size: int,
        num_tokens: int,
        dtype: torch.dtype | None = None,
        reversible: int = 0,
        longterm: LongTerm | None = None,
    ) -> int:
        """Bytes of the state of `batch_size` rows of `num_tokens` tokens, wherever they
        are kept.

        dtype: of keys and values. Default: None, that of the weights. The other
        arguments are those of `initial_state`. A bank is not counted.
        """
        entries = self.state_of(dtype or self.own_dtype, longterm).values()
        return batch_size * sum(entry.nbytes(num_tokens, reversible) for entry in entries)

    @property
    def own_dtype(self) -> torch.dtype:
        """The dtype of the first floating-point weight; without one, torch's default
        dtype."""
        # A quantized layer has weights of whole numbers, which say nothing about keys
        # and values.
        return next(
            (p.dtype for p in self.parameters() if p.is_floating_point()), torch.get_default_dtype()
        )

    @property
    def own_device(self) -> torch.device:
        """The device of the weights; without weights, torch's default device."""
        return next((p.device for p in self.parameters()), torch.get_default_device())

    def init_weights(self, std: float, residual_std: float) -> None:
        """GPT-2's initialization: normal weights of standard deviation `std`, zero
        biases.

        residual_std: that of the output projection, which writes into the residual
            stream.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=residual_std if module is self.o_proj else std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # The router starts at a mix of its own choice, whatever the loop above drew for
        # it.
        for module in self.modules():
            if isinstance(module, Router):
                module.reset_output()

    def keys_attended(self, context: int) -> int:
        """How many tokens the last of `context` tokens attends to, sinks included."""
        return context if self.window is None else self.window.tokens_seen(context)

    @property
    def window(self) -> Window | None:
        """What the local level sees; None: the whole past."""
        if self.local_window is None:
            return None
        # Without rotary embeddings scores do not depend on distance, so there is
        # nothing to limit.
        until = None if self.rotary is None else self.max_distance
        return Window(self.local_window, self.sink_tokens, self.window_begins, until)

    @property
    def window_begins(self) -> int:
        """The window is extended back to a multiple of this many tokens; 1: not at
        all."""
        return 1

    def far_queries(self, q: Tensor, positions: Tensor | None, t: Tensor) -> Tensor:
        """Queries for the sinks of tokens that are more than `max_distance` away from
        them.

        q (B, T, H, D) before any rotary embedding, positions (B or 1, T) and token
        indices t (B or 1, T) -> (B, T, H, D), rotated to that distance from the token
        with index 0.
        """
        # positions - t is the position of token 0, which need not be 0 in a row given
        # by the user.
        return q if positions is None else self.rotate(q, positions - t + (self.max_distance or 0))

    def linear_parameters(self, *shapes: tuple[int, int]) -> int:
        """Parameters of linear layers of (inputs, outputs) each, and of the output
        projection."""
        before = sum(inputs * outputs + outputs * bool(self.bias) for inputs, outputs in shapes)
        return before + self.inner_size * self.hidden_size + self.hidden_size * (self.bias is True)

    def output_projection(self) -> nn.Linear:
        """The linear layer from all heads (H D) back to C."""
        return nn.Linear(self.inner_size, self.hidden_size, bias=self.bias is True)

    def rotate(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """x (B, T, H, D) rotated to positions (T,) or (B, T); unchanged without rotary
        embeddings or positions."""
        return x if self.rotary is None or positions is None else self.rotary(x, positions)

    @cached_property
    def form_of_state(self) -> dict[str, Entry]:
        """The stores of a state apart from their dtype, as `State.check` compares
        them."""
        # Cached: building it again for every layer and token would slow down decoding.
        return self.state_entries(torch.float32)


def bounded(x: Tensor) -> Tensor:
    """x with finite numbers clamped to the square root of the largest that its dtype
    can hold.

    Products of two of them then stay finite, which keeps the future out of the past:
    attention gives it a weight of zero, and zero times infinity is not zero. NaN and
    infinity are kept, since a training has to stop at them. x of dtype float16 is
    returned unchanged.
    """
    # The root of float16's largest number is 256, which the activations of a model may
    # well exceed.
    if x.dtype == torch.float16:
        return x
    limit = math.sqrt(torch.finfo(x.dtype).max)
    return torch.where(x.isinf(), x, x.clamp(-limit, limit))


def normalize(norm: nn.Module, x: Tensor) -> Tensor:
    """norm(x), with x in the dtype of the norm's weights."""
    # Under autocast the two dtypes may differ, and torch then leaves its fused kernel.
    return norm(x.to(next((p.dtype for p in norm.parameters()), x.dtype)))
