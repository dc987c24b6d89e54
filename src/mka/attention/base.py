"""The contract every mechanism signs (docs/attention.md)."""

import math
from abc import ABC, abstractmethod
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn

from mka.limits import InputError, check_distance, check_heads, check_sinks, check_whole
from mka.memory.entry import Entry
from mka.memory.local import token_index
from mka.memory.places import LongTerm
from mka.memory.router import Router
from mka.memory.state import State
from mka.ops.attend import Window
from mka.ops.packing import packing, pieces
from mka.ops.rotary import RotaryEmbedding

Bias = bool | Literal["qkv"]
"""Which projections have a bias: all, none, or all but the output projection."""


class CausalAttention(nn.Module, ABC):
    """Causal attention over x (B, T, C), whatever the mechanism.

        y, state = attn(x, positions=None, valid=None, state=None)

    A mechanism implements `mix` on rows without padding, what a state keeps for it, and its two cost functions.
    """

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
        check_heads(hidden_size if head_dim is None else num_heads * head_dim, num_heads, num_kv_heads)
        check_whole("head_dim", head_dim, 1)
        check_whole("local_window", local_window, 1)
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim or hidden_size // num_heads
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
            x: (B, T, C), normalised by the block.
            positions: (B, T) or (T,), the place of each valid token in its own row; only rotary embeddings read them.
                Default: valid tokens counted from 0, those of the state included.
            valid: (B, T) bool, False for padding, wherever it stands in a row. Default: all valid.
            state: what `initial_state` gave, or an earlier call returned: x goes on where that call ended.
                None: nothing comes before, and nothing is kept.
            documents: (B, T) whole numbers: tokens of one document of a row have one number and stand together. Each
                document is as a row of its own, whatever is packed beside it. None: every row is one document.

        Returns:
            y (B, T, C) and the state to go on with, None without one. Raises ValueError for a state of another
            mechanism, of other options or with another number of rows, and for documents with a state.
        """
        batch, tokens = x.shape[:2]
        if not tokens:
            return torch.zeros_like(x), state
        if documents is not None:
            if state is not None:
                raise InputError(
                    "documents are packed in a row, and there is a state; a state goes on with one document"
                )
            return self.apart(x, positions, valid, documents), None
        if state is not None:
            state.check(type(self).__name__, self.form_of_state, batch)
            counts = [tokens] * batch if valid is None else valid.sum(1).tolist()
            state.begin(counts)
            if counts == [tokens] * batch:
                valid = None
        if self.rotary is None:
            positions = None
        x = bounded(x)
        rows = None if valid is None else packing(valid)
        if rows is not None:
            x = rows.pack(x)
            positions = None if positions is None else rows.pack(positions.expand(x.shape[:2]))
        if self.rotary is not None and positions is None:
            positions = token_index(x, state)
        y = self.mix(x, positions, state)
        if state is not None:
            state.end()
        return y if rows is None else rows.unpack(y), state

    def apart(self, x: Tensor, positions: Tensor | None, valid: Tensor | None, documents: Tensor) -> Tensor:
        """y (B, T, C) of rows in which several documents are packed; see `forward`."""
        rows, tokens = x.flatten(0, 1), x.shape[:2]
        places = None if positions is None else positions.expand(tokens).flatten()
        y = torch.zeros_like(rows)
        for where, there in pieces(documents, valid):
            part = rows[where].masked_fill(~there.unsqueeze(2), 0)
            read, _ = self.forward(part, None if places is None else places[where])
            y = y.to(read.dtype).index_put((where[there],), read[there])
        return y.view(x.shape)

    @abstractmethod
    def mix(self, x: Tensor, positions: Tensor | None, state: State | None) -> Tensor:
        """x (B, T, C) without padding, positions (T,) or (B or 1, T), None if none are rotated -> y (B, T, C)."""

    @abstractmethod
    def state_entries(self, dtype: torch.dtype) -> dict[str, Entry]:
        """The stores of a state, keys and values in `dtype`, sums and means in float32 or better."""

    def initial_state(
        self,
        batch_size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        reversible: int = 0,
        longterm: LongTerm | None = None,
    ) -> State:
        """The state of rows that have seen nothing. dtype and device None: the module's own.

        `reversible`: how many of the latest tokens can be taken back, where the state is bounded. `longterm`: where
        what is retrieved is kept and how it is found (None: on the device, exactly).
        Raises ValueError for a mechanism that retrieves nothing where something else is asked for.
        """
        entries = self.state_of(dtype or self.own_dtype, longterm)
        if longterm is not None and longterm.is_special and not self.retrieves:
            raise InputError(
                f"{longterm.asked_for}; {type(self).__name__} as it is here retrieves nothing; allowed: "
                "longterm_store device, no bank"
            )
        return State(type(self).__name__, entries, batch_size, device or self.own_device, reversible, longterm)

    def state_of(self, dtype: torch.dtype, longterm: LongTerm | None) -> dict[str, Entry]:
        """The stores of a state whose long-term memory is kept and searched that way."""
        return self.state_entries(dtype)

    @property
    def retrieves(self) -> bool:
        """Whether it reads chunks of the past."""
        return any(entry.block is not None for entry in self.form_of_state.values())

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """Parameters, computed from the configuration."""

    @abstractmethod
    def flops_per_token(self, context: int) -> int:
        """FLOPs of the matrix products (2 a multiply-add) of the forward pass of one token.

        The token is the last of `context` tokens; keys and values are computed once per token.
        """

    def state_nbytes(
        self,
        batch_size: int,
        num_tokens: int,
        dtype: torch.dtype | None = None,
        reversible: int = 0,
        longterm: LongTerm | None = None,
    ) -> int:
        """Bytes of the state of `batch_size` rows of `num_tokens` tokens in `dtype` (None: the module's own), wherever
        they are kept; those of a bank are not counted."""
        entries = self.state_of(dtype or self.own_dtype, longterm).values()
        return batch_size * sum(entry.nbytes(num_tokens, reversible) for entry in entries)

    @property
    def own_dtype(self) -> torch.dtype:
        """That of the weights which are real numbers: a quantized layer has others, or none."""
        return next((p.dtype for p in self.parameters() if p.is_floating_point()), torch.get_default_dtype())

    @property
    def own_device(self) -> torch.device:
        """That of the weights."""
        return next((p.device for p in self.parameters()), torch.get_default_device())

    def init_weights(self, std: float, residual_std: float) -> None:
        """GPT-2's initialisation: normal weights, zero biases, the projection into the residual stream scaled."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=residual_std if module is self.o_proj else std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Router):
                module.reset_output()

    def keys_attended(self, context: int) -> int:
        """Tokens that the last of `context` tokens sees in its local window, sinks included."""
        return context if self.window is None else self.window.tokens_seen(context)

    @property
    def window(self) -> Window | None:
        """What the local level sees; None: the whole past. Without rotary embeddings there are no distances."""
        if self.local_window is None:
            return None
        until = None if self.rotary is None else self.max_distance
        return Window(self.local_window, self.sink_tokens, self.window_begins, until)

    @property
    def window_begins(self) -> int:
        """Tokens to whose multiples the beginning of a window reaches back."""
        return 1

    def far_queries(self, q: Tensor, positions: Tensor | None, t: Tensor) -> Tensor:
        """q (B, T, H, D), not yet rotated, as tokens further than `max_distance` from a row's first ones meet them.

        They stand at that distance from the token with index 0, whatever its position.
        """
        return q if positions is None else self.rotate(q, positions - t + (self.max_distance or 0))

    def linear_parameters(self, *shapes: tuple[int, int]) -> int:
        """Parameters of linear layers of (inputs, outputs) before the attention, and of the output projection."""
        before = sum(inputs * outputs + outputs * bool(self.bias) for inputs, outputs in shapes)
        return before + self.inner_size * self.hidden_size + self.hidden_size * (self.bias is True)

    def output_projection(self) -> nn.Linear:
        return nn.Linear(self.inner_size, self.hidden_size, bias=self.bias is True)

    def rotate(self, x: Tensor, positions: Tensor | None) -> Tensor:
        return x if self.rotary is None or positions is None else self.rotary(x, positions)

    @cached_property
    def form_of_state(self) -> dict[str, Entry]:
        """`state_entries`, made once: a step of decoding is short."""
        return self.state_entries(torch.float32)


def bounded(x: Tensor) -> Tensor:
    """x, no finite number of it beyond the root of its dtype's largest: products with it then stay finite.

    Attention gives the future a weight of zero, and zero times infinity is not zero. NaN and infinity stay what they
    are: a training has to stop at them. float16 is left as it is: its root is 256, a number that a model may well need.
    """
    if x.dtype == torch.float16:
        return x
    limit = math.sqrt(torch.finfo(x.dtype).max)
    return torch.where(x.isinf(), x, x.clamp(-limit, limit))


def normalise(norm: nn.Module, x: Tensor) -> Tensor:
    """`norm` in the dtype that it takes: under autocast a mismatch leaves the fused kernel."""
    return norm(x.to(next((p.dtype for p in norm.parameters()), x.dtype)))
