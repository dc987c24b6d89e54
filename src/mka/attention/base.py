"""The contract every mechanism signs (docs/attention.md)."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from mka.config import check_at_least, check_heads
from mka.memory.router import Router
from mka.ops.packing import packing
from mka.ops.rotary import RotaryEmbedding


class CausalAttention(nn.Module, ABC):
    """Causal attention over x (B, T, C), whatever the mechanism.

        y, state = attn(x, positions=None, valid=None, state=None)

    A mechanism implements `mix` on rows without padding, and its three cost functions.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        local_window: int | None,
        bias: bool,
        rotary: RotaryEmbedding | None,
    ) -> None:
        super().__init__()
        check_heads(hidden_size, num_heads, num_kv_heads)
        check_at_least("local_window", local_window, 1)
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = hidden_size // num_heads
        self.local_window = local_window
        self.bias = bias
        self.rotary = rotary

    def forward(
        self, x: Tensor, positions: Tensor | None = None, valid: Tensor | None = None, state: None = None
    ) -> tuple[Tensor, None]:
        """Attend; outputs at padding are zeros.

        Args:
            x: (B, T, C), normalised by the block.
            positions: (B, T) or (T,), the place of each valid token in its own row; only rotary embeddings read them.
                Default: valid tokens counted from 0.
            valid: (B, T) bool, False for padding, wherever it stands in a row. Default: all valid.
            state: None; decoding with a carried state is not part of this version.

        Returns:
            y (B, T, C) and None, the place of the state.
        """
        if state is not None:
            raise NotImplementedError("decoding with a state is not available yet; pass state=None")
        if valid is None:
            return self.mix(x, torch.arange(x.shape[1], device=x.device) if positions is None else positions), None
        rows = packing(valid)
        if positions is None:
            packed_positions = torch.arange(x.shape[1], device=x.device)
        else:
            packed_positions = rows.pack(positions.expand(valid.shape))
        return rows.unpack(self.mix(rows.pack(x), packed_positions)), None

    @abstractmethod
    def mix(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B, T, C) without padding, positions (T,) or (B, T) -> y (B, T, C)."""

    @property
    @abstractmethod
    def num_parameters(self) -> int:
        """Parameters, computed from the configuration."""

    @abstractmethod
    def state_numbers(self, num_tokens: int) -> int:
        """Floating-point numbers that decoding must keep for one row of `num_tokens` tokens."""

    @abstractmethod
    def flops_per_token(self, context: int) -> int:
        """FLOPs of the matrix products (2 a multiply-add) of the forward pass of one token.

        The token is the last of `context` tokens; keys and values are computed once per token.
        """

    def state_nbytes(self, batch_size: int, num_tokens: int, dtype: torch.dtype | None = None) -> int:
        """Bytes of the state of `batch_size` rows of `num_tokens` tokens in `dtype` (None: the module's own)."""
        dtype = dtype or next(self.parameters()).dtype
        return batch_size * self.state_numbers(num_tokens) * dtype.itemsize

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
        """Tokens inside the local window of the last of `context` tokens."""
        return context if self.local_window is None else min(context, self.local_window)

    def linear_parameters(self, *shapes: tuple[int, int]) -> int:
        """Parameters of linear layers of (inputs, outputs), with the mechanism's bias setting."""
        return sum(inputs * outputs + outputs * self.bias for inputs, outputs in shapes)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return x if self.rotary is None else self.rotary(x, positions)
