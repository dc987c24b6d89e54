"""Rotary position embedding (RoFormer, arXiv 2104.09864), as an object that rotates to any positions."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mka.ops.precision import no_autocast, upcast


@dataclass(frozen=True)
class RotaryEmbedding:
    """Rotates pairs (i, i + D/2) of a head by position * base^(-2i/D), or by position * frequencies[i].

    `scaling` multiplies the rotated heads, as YaRN has it. Raises ValueError for an odd head_dim, and for frequencies
    that are not half as many.
    """

    head_dim: int
    base: float = 10000.0
    frequencies: tuple[float, ...] | None = None
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}; rotary embeddings need an even number from 2 up")
        if self.frequencies is not None and 2 * len(self.frequencies) != self.head_dim:
            raise ValueError(f"frequencies are {len(self.frequencies)}; head_dim {self.head_dim} needs half as many")

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """x (B, T, H, D), positions (T,) or (B, T) -> (B, T, H, D) in x's dtype."""
        return self.turn(x, positions, self.scaling)

    def turn(self, x: Tensor, positions: Tensor, scaling: float = 1.0) -> Tensor:
        """Rotation alone: what was embedded at p becomes what would be embedded at p + positions."""
        with no_autocast(x):
            wide = upcast(x)
            angle = positions[..., None].to(wide.dtype) * self.rates(wide)
            cos, sin = (scaled.unsqueeze(-2) * scaling for scaled in (angle.cos(), angle.sin()))
            a, b = wide.chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)

    def rates(self, like: Tensor) -> Tensor:
        """(D / 2,): the angle of each pair at position 1; in float32 they are rounded as in the pretrained models."""
        make = made if torch.compiler.is_compiling() else made_once
        return make(self, like.device, like.dtype)


@lru_cache(maxsize=64)
def made_once(rotary: RotaryEmbedding, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The rates of an embedding; a decoded token asks for them a dozen times a layer."""
    with torch.inference_mode(mode=False):  # what is kept serves later calls of any kind
        return made(rotary, device, dtype)


def made(rotary: RotaryEmbedding, device: torch.device, dtype: torch.dtype) -> Tensor:
    if rotary.frequencies is not None:
        return torch.tensor(rotary.frequencies, device=device, dtype=dtype)
    pair = torch.arange(0, rotary.head_dim, 2, device=device, dtype=dtype)
    return 1.0 / rotary.base ** (pair / rotary.head_dim)
