"""Another model as teacher: what it predicts is what is to be predicted, token by token."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

PIECE = 512
"""Predictions compared at once: of no more than that are there probabilities in float32."""


class Teacher:
    """The loss of a model against another one: KL(teacher || model), nats per token (Hinton et al., 1503.02531)."""

    def __init__(self, model: Any) -> None:
        """`model` is asked as it is; nothing of it is trained."""
        self.model = model.eval().requires_grad_(False)

    def __call__(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """tokens (B, T + 1), as in `next_token_loss` -> the mean over the T predictions of each row, a scalar."""
        ids = tokens[:, :-1]
        with torch.no_grad():
            wanted = self.model(ids, use_cache=False).logits.flatten(0, 1)
        found = model(ids, use_cache=False).logits.flatten(0, 1)
        parts = zip(found.split(PIECE), wanted.split(PIECE), strict=True)
        total = [checkpoint(divergence, *part, use_reentrant=False) for part in parts]
        return torch.stack([*total]).sum() / len(found)


def divergence(found: Tensor, wanted: Tensor) -> Tensor:
    """The sum over N predictions of KL(softmax(wanted) || softmax(found)); logits (N, V)."""
    target = wanted.float().log_softmax(-1)
    return (target.exp() * (target - found.float().log_softmax(-1))).sum()
