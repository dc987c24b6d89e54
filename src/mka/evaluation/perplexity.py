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
    """Sums over a held-out split: nats, the tokens they were paid for, and the UTF-8 bytes behind those tokens.

    `block_losses`: nats per token of each block, in the order of the split.
    """

    nats: float
    tokens: int
    num_bytes: int
    block_losses: tuple[float, ...] = ()

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss), per token of this tokenizer; infinite where it is beyond every number."""
        return math.inf if self.loss > 709 else math.exp(self.loss)

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
    blocks: list[tuple[int, list[float]]] = []
    remaining, first = iter(batches), 0
    while turn := list(islice(remaining, ranks.count)):
        batch, covered = turn[min(ranks.rank, len(turn) - 1)]
        with autocast or nullcontext():
            losses = next_token_loss(model, batch.to(device), reduction="none").double()
        if ranks.rank < len(turn):
            nats += losses.sum().item()
            blocks.append((first + ranks.rank, losses.view(len(batch), -1).mean(1).tolist()))
            tokens += losses.numel()
            num_bytes += covered
        first += len(turn)
    nats, all_tokens, all_bytes = ranks.sum((nats, tokens, num_bytes))
    in_order = sorted(block for of_rank in ranks.gather(blocks) for block in of_rank)
    return HeldOutLoss(nats, int(all_tokens), int(all_bytes), tuple(loss for _, block in in_order for loss in block))
