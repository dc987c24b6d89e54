"""Held-out loss, in the units that can be compared."""

import math
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from mka.distributed import Ranks
from mka.models import next_token_loss


@dataclass(frozen=True)
class HeldOutLoss:
    """Sums over a held-out split: nats, the tokens they were paid for, and the UTF-8 bytes behind those tokens."""

    nats: float
    tokens: int
    num_bytes: int

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss), per token of this tokenizer."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers."""
        return self.nats / math.log(2) / self.num_bytes


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, int]],
    device: torch.device,
    autocast: AbstractContextManager | None = None,
    ranks: Ranks | None = None,
) -> HeldOutLoss:
    """Score (tokens (b, T + 1), bytes) batches, spread over the ranks; every token counts once, the sum is in float64.

    Collective: every rank makes the same number of forward passes, because a sharded model gathers its weights in
    each; where the batches run out, a rank scores the last one again and does not count it.
    """
    ranks = ranks or Ranks()
    model.eval()
    nats, tokens, num_bytes = 0.0, 0, 0
    remaining = iter(batches)
    while turn := list(islice(remaining, ranks.count)):
        batch, covered = turn[min(ranks.rank, len(turn) - 1)]
        with autocast or nullcontext():
            losses = next_token_loss(model, batch.to(device), reduction="none")
        if ranks.rank < len(turn):
            nats += losses.double().sum().item()
            tokens += losses.numel()
            num_bytes += covered
    nats, all_tokens, all_bytes = ranks.sum((nats, tokens, num_bytes))
    return HeldOutLoss(nats, int(all_tokens), int(all_bytes))
