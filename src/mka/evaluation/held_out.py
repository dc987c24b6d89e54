"""Held-out loss, in units that can be compared between models."""

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
    """Sums over a held-out split.

    Attributes:
        nats: the summed loss.
        tokens: the tokens that were predicted.
        num_bytes: the bytes of UTF-8 of these tokens.
        block_losses: the loss of each block in nats per token, in the order of the
            split.
    """

    nats: float
    tokens: int
    num_bytes: int
    block_losses: tuple[float, ...] = ()

    @property
    def loss(self) -> float:
        """The mean loss, in nats per token."""
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """exp(loss), per token of this tokenizer; infinite if it is too large for a
        float."""
        # math.exp raises an error above about 709.
        return math.inf if self.loss > 709 else math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """The loss in bits per byte of UTF-8, which can be compared between
        tokenizers."""
        return self.nats / math.log(2) / self.num_bytes


@torch.no_grad()
def held_out_loss(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, int]],
    device: torch.device,
    autocast: AbstractContextManager | None = None,
    ranks: Ranks | None = None,
) -> HeldOutLoss:
    """Score batches, which the ranks divide among them; every token counts once.
    Collective.

    Args:
        model: the model; it is left in evaluation mode.
        batches: pairs of tokens (b, T + 1) and the bytes of UTF-8 that the predicted
            ones cover.
        device: where the model is.
        autocast: the context to compute in; None: the weights' own precision.
        ranks: the processes; None: this one alone.
    """
    ranks = ranks or Ranks()
    model.eval()
    nats, tokens, num_bytes = 0.0, 0, 0
    blocks: list[tuple[int, list[float]]] = []
    remaining, first = iter(batches), 0
    while turn := list(islice(remaining, ranks.count)):
        # Every rank makes the same number of forward passes, because a sharded model
        # gathers its weights in each. Where the batches run out, a rank scores the last
        # one again, uncounted.
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
    # Batches went to the ranks in turns; their numbers put the blocks back in order.
    numbered: list[tuple[int, list[float]]] = []
    for of_rank in ranks.gather(blocks):
        numbered += of_rank
    block_losses: list[float] = []
    for _, losses_of_batch in sorted(numbered):
        block_losses += losses_of_batch
    return HeldOutLoss(nats, int(all_tokens), int(all_bytes), tuple(block_losses))
