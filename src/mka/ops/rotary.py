"""Rotary position embedding (RoFormer, arXiv 2104.09864), as an object that rotates to
any positions."""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from mka.ops.precision import no_autocast, upcast


@dataclass(frozen=True)
class RotaryEmbedding:
    """Rotates the pairs (i, i + D/2) of a head by position * base^(-2i/D) radians.

    Args:
        head_dim: D, even.
        base: base of the frequencies. Default: 10000.
        frequencies: D / 2 angles per position, in radians, in place of base^(-2i/D).
            Default: None.
        scaling: factor of the rotated heads, as in YaRN. Default: 1.

    Raises ValueError if head_dim is odd or frequencies are not D / 2.
    """

    head_dim: int
    base: float = 10000.0
    frequencies: tuple[float, ...] | None = None
    scaling: float = 1.0

    def __post_init__(self) -> None:
        if self.head_dim < 2 or self.head_dim % 2:
            raise ValueError(
                f"head_dim is {self.head_dim}; rotary embeddings need an even number of at least 2"
            )
        if self.frequencies is not None and 2 * len(self.frequencies) != self.head_dim:
            raise ValueError(
                f"frequencies has {len(self.frequencies)} entries; head_dim {self.head_dim} "
                f"needs {self.head_dim // 2}"
            )

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate x (B, T, H, D) to positions (T,) or (B, T) and scale it; in x's
        dtype."""
        return self.turn(x, positions, self.scaling)

    def turn(self, x: Tensor, positions: Tensor, scaling: float = 1.0) -> Tensor:
        """Rotate x (B, T, H, D) by positions (T,) or (B, T), times `scaling` (default
        1).

        Rotations add up, so a head that was embedded at p is then embedded at p +
        positions.
        """
        # bfloat16 cannot tell positions above 256 apart.
        with no_autocast(x):
            wide = upcast(x)
            angle = positions[..., None].to(wide.dtype) * self.rates(wide)
            cos, sin = (scaled.unsqueeze(-2) * scaling for scaled in (angle.cos(), angle.sin()))
            # Pairs are (i, i + D/2), as in Llama and its relatives, not (2i, 2i + 1).
            a, b = wide.chunk(2, dim=-1)
            return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)

    def rates(self, like: Tensor) -> Tensor:
        """(D / 2,): the angle of each pair at position 1, in radians, on the device and
        in the dtype of `like`; in float32 rounded as in the pretrained models."""
        # torch.compile cannot trace through lru_cache.
        make = made if torch.compiler.is_compiling() else made_once
        return make(self, like.device, like.dtype)


@lru_cache(maxsize=64)
def made_once(rotary: RotaryEmbedding, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`made`, cached: decoding one token asks for the rates a dozen times per layer."""
    # A tensor that was made in inference mode could not serve a later call that trains.
    with torch.inference_mode(mode=False):
        return made(rotary, device, dtype)


def made(rotary: RotaryEmbedding, device: torch.device, dtype: torch.dtype) -> Tensor:
    """The rates (D / 2,) of an embedding, in radians per position."""
    if rotary.frequencies is not None:
        return torch.tensor(rotary.frequencies, device=device, dtype=dtype)
    # In the dtype of use: angles computed in float64 and then rounded would differ from
    # those that a pretrained model was trained with.
    pair = torch.arange(0, rotary.head_dim, 2, device=device, dtype=dtype)
    return 1.0 / rotary.base ** (pair / rotary.head_dim)
