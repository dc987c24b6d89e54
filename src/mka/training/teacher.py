"""Training with another model as teacher: a model learns to predict what the teacher
predicts."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PIECE = 512
"""Predictions compared at once, which bounds the memory for probabilities in
float32."""


class Teacher:
    """A loss: KL(teacher || model), in nats per token (Hinton et al., arXiv
    1503.02531)."""

    def __init__(self, model: Any) -> None:
        """`model` becomes the teacher: it is put in evaluation mode, and is not
        trained."""
        self.model = model.eval().requires_grad_(False)

    def __call__(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """The mean loss over the T predictions of each row of tokens (B, T + 1): a
        scalar."""
        # The last token is only predicted, as in `next_token_loss`.
        ids = tokens[:, :-1]
        with torch.no_grad():
            wanted = self.model(ids, use_cache=False).logits.flatten(0, 1)
        found = model(ids, use_cache=False).logits.flatten(0, 1)
        parts = zip(found.split(PIECE), wanted.split(PIECE), strict=True)
        # Checkpointed: the probabilities of a part are computed again in the backward
        # pass, so that those of all parts are never in memory together.
        total = [checkpoint(divergence, *part, use_reentrant=False) for part in parts]
        return torch.stack([*total]).sum() / len(found)


def divergence(found: Tensor, wanted: Tensor) -> Tensor:
    """The sum over N predictions of KL(softmax(wanted) || softmax(found)); both logits
    (N, V)."""
    target = wanted.float().log_softmax(-1)
    return (target.exp() * (target - found.float().log_softmax(-1))).sum()
