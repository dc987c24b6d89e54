"""A small language model with the original attention, rebuilt from its description, and switches
for its two leaks.

    x -- q, k, v --> a_1 = softmax(q k^T / sqrt(D)) v    causal; original: over the whole row
    m = mean of x --> a_2 = Wv m                         of the tokens so far; original: of the row
    y = Wo (lambda_1 a_1 + lambda_2 a_2 + lambda_3 0)    lambda = softmax(router(q)); L3 is zeros,
                                                         as in the original

This is for `mka audit original` alone; the mechanisms to use are in mka.attention.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

LEVELS = 3
"""Logits of the router: local, session, long-term."""


class OriginalAttention(nn.Module):
    """The original attention: x (B, T, C) -> y (B, T, C).

    Args:
        hidden_size: C.
        num_heads: H; it must divide C.
        is_causal: whether a token attends to the past alone; the original does not.
        mean_so_far: whether the mean is over the past alone; the original's is over the
            whole row.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, *, is_causal: bool, mean_so_far: bool
    ) -> None:
        super().__init__()
        self.num_heads, self.is_causal, self.mean_so_far = num_heads, is_causal, mean_so_far
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.o_proj = nn.Linear(hidden_size, hidden_size)
        self.router = nn.Linear(hidden_size, LEVELS)

    def forward(self, x: Tensor) -> Tensor:
        """Attend and average, weighed by the router: x (B, T, C) -> y (B, T, C)."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        heads = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        tokens = (
            scaled_dot_product_attention(*heads, is_causal=self.is_causal)
            .transpose(1, 2)
            .flatten(2)
        )
        count = torch.arange(1, x.shape[1] + 1, device=x.device).view(-1, 1)
        mean = x.cumsum(1) / count if self.mean_so_far else x.mean(1, keepdim=True)
        # The weight of L3 is lost: the original reads zeros there.
        local, session, _ = self.router(q).softmax(-1).split(1, dim=-1)
        return self.o_proj(local * tokens + session * self.v_proj(mean))


class OriginalLM(nn.Module):
    """A language model with learned positions, pre-norm layers and tied embeddings: ids
    (B, T) -> logits (B, T, V).

    Args:
        vocab_size: V.
        sequence_length: positions, the longest T.
        hidden_size: C. Default: 64.
        num_heads: H. Default: 4.
        num_layers: layers. Default: 2.
        is_causal, mean_so_far: those of `OriginalAttention`.
    """

    def __init__(
        self,
        vocab_size: int,
        sequence_length: int,
        hidden_size: int = 64,
        num_heads: int = 4,
        num_layers: int = 2,
        *,
        is_causal: bool,
        mean_so_far: bool,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, hidden_size)
        self.places = nn.Embedding(sequence_length, hidden_size)
        # Small, because the embeddings are also the output layer: logits start near 1.
        nn.init.normal_(self.tokens.weight, std=hidden_size**-0.5)
        nn.init.normal_(self.places.weight, std=hidden_size**-0.5)
        self.attentions = nn.ModuleList(
            OriginalAttention(hidden_size, num_heads, is_causal=is_causal, mean_so_far=mean_so_far)
            for _ in range(num_layers)
        )
        self.mlps = nn.ModuleList(
            nn.Sequential(
                nn.Linear(hidden_size, 4 * hidden_size),
                nn.GELU(),
                nn.Linear(4 * hidden_size, hidden_size),
            )
            for _ in range(num_layers)
        )
        # Two per layer, and one before the logits.
        self.norms = nn.ModuleList(nn.LayerNorm(hidden_size) for _ in range(2 * num_layers + 1))

    def forward(self, ids: Tensor) -> Tensor:
        """The logits (B, T, V) of ids (B, T)."""
        x = self.tokens(ids) + self.places.weight[: ids.shape[1]]
        for number, (attention, mlp) in enumerate(zip(self.attentions, self.mlps, strict=True)):
            x = x + attention(self.norms[2 * number](x))
            x = x + mlp(self.norms[2 * number + 1](x))
        return self.norms[-1](x) @ self.tokens.weight.T
