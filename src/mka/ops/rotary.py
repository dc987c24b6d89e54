"""Rotary position embedding (RoFormer, arXiv 2104.09864), as an object that rotates to any positions."""

from dataclasses import dataclass

import torch
from torch import Tensor

from mka.ops.precision import no_autocast, upcast


@dataclass(frozen=True)
class RotaryEmbedding:
    """Rotates pairs (i, i + D/2) of a head by position * base^(-2i/D).

    Raises ValueError for an odd head_dim.
    """

    head_dim: int
    base: float = 10000.0

    def __post_init__(self) -> None:
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embeddings need an even number from 2 up")

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B, T, H, D), positions (T,) or (B, T) -> (B, T, H, D) in x's dtype."""
        with no_autocast(x):
            wide = upcast(x)
            pair = torch.arange(0, self.head_dim, 2, device=x.device, dtype=wide.dtype)
            angle = positions[..., None].to(wide.dtype) * self.base ** (-pair / self.head_dim)
            cos, sin = angle.cos().unsqueeze(-2), angle.sin().unsqueeze(-2)
            a, b = wide.chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)
