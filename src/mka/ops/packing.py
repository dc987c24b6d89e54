"""Padding, handled once for every mechanism.

    row      a . b . . c d      valid = 1 0 1 0 0 1 1
    packed   a b c d 0 0 0      what the mechanism sees: its tokens first, in order, then zeros
    row      A 0 B 0 0 C D      the outputs back in their places

A causal mechanism cannot see what comes after a token, so in a packed row no valid token meets padding at any
level: window, averages, chunks and retrieval count valid tokens and nothing else.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Packing(NamedTuple):
    """order (B, T): the column of the row that stands at each packed column; kept (B, T): True for valid tokens."""

    order: Tensor
    kept: Tensor

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, ...) -> (B, T, ...), valid tokens first, zeros after them."""
        packed = x.gather(1, self._index(x))
        return packed.masked_fill(~self._like(self.kept, x), 0)

    def unpack(self, y: Tensor) -> Tensor:
        """The inverse of `pack`; padding gives zeros."""
        y = y.masked_fill(~self._like(self.kept, y), 0)
        return torch.zeros_like(y).scatter(1, self._index(y), y)

    def _index(self, x: Tensor) -> Tensor:
        return self._like(self.order, x).expand_as(x)

    @staticmethod
    def _like(table: Tensor, x: Tensor) -> Tensor:
        return table.reshape(*table.shape, *[1] * (x.dim() - 2))


def packing(valid: Tensor) -> Packing:
    """The packing of rows whose valid tokens are marked in `valid` (B, T) bool."""
    order = torch.argsort(~valid, dim=1, stable=True)
    return Packing(order, valid.gather(1, order))
