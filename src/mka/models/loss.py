"""The language-model loss, the same for training and evaluation."""

from torch import Tensor, nn
from torch.nn.functional import cross_entropy


def next_token_loss(model: nn.Module, tokens: Tensor, reduction: str = "mean") -> Tensor:
    """Cross-entropy, nats, of the T predictions in each block: tokens (B, T + 1) -> scalar, or (B, T) for "none"."""
    logits = model(tokens[:, :-1], use_cache=False).logits
    loss = cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction=reduction)
    return loss.view(tokens.shape[0], -1) if reduction == "none" else loss
