"""Attention modules for the audit: correct ones, and one for each leak."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import DynamicCache, GPT2Config
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

from mka.models import CACHE_ARGUMENT


class Causal(nn.Module):
    """One head, causal, with an optional padding mask and a state of all tokens."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(hidden_size, hidden_size) for _ in range(3))

    def initial_state(self, rows: int) -> dict[str, Any]:
        return {}

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, state: dict[str, Any] | None = None
    ) -> Any:
        seen = x
        if state is not None:
            seen = torch.cat([state["x"], x], 1) if "x" in state else x
            state["x"] = seen
        past = seen.shape[1] - x.shape[1]
        mask = self.allowed(x.shape[1], seen.shape[1], past)
        if attention_mask is not None:
            mask = mask & attention_mask[:, None, :]
        mask = mask | torch.eye(x.shape[1], seen.shape[1], dtype=torch.bool).roll(past, 1)
        return self.attend(self.q(x), self.k(seen), self.v(seen), mask), state

    def allowed(self, tokens: int, seen: int, past: int) -> Tensor:
        return torch.ones(tokens, seen, dtype=torch.bool).tril(past)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)


class NoMask(Causal):
    def allowed(self, tokens: int, seen: int, past: int) -> Tensor:
        return torch.ones(tokens, seen, dtype=torch.bool)


class OneTooFar(Causal):
    """The one next token is seen, too."""

    def allowed(self, tokens: int, seen: int, past: int) -> Tensor:
        return torch.ones(tokens, seen, dtype=torch.bool).tril(past + 1)


class Around(nn.Module):
    """A correct module inside; what is done around it leaks."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.inside = Causal(hidden_size)


class DetachedMean(Around):
    """The mean of the row, future included, without a gradient."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.inside(x, attention_mask)[0] + 0.1 * x.detach().mean(1, keepdim=True)


class SmallMask(Causal):
    """-1e4 instead of minus infinity."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = q @ k.transpose(1, 2) + torch.where(mask, 0.0, -1e4).to(q.dtype)
        return scores.softmax(-1) @ v


class ScaledByLength(Around):
    """Its outputs depend on how long the row is: no gradient shows it, nor does another token."""

    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x)[0] / x.shape[1]


class MaskIgnored(Around):
    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.inside(x)[0]


class BatchMean(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.inside(x - x.mean(0, keepdim=True))[0]


class ForgetsItsState(Causal):
    """Decodes with the latest four tokens alone."""

    def forward(
        self, x: Tensor, attention_mask: Tensor | None = None, state: dict[str, Any] | None = None
    ) -> Any:
        y, state = super().forward(x, attention_mask, state)
        if state is not None:
            state["x"] = state["x"][:, -4:]
        return y, state


class NeedsMore(Around):
    def forward(self, x: Tensor, rope: Tensor) -> Tensor:
        return self.inside(x)[0] + rope


class Random(Around):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand(())


class Halves(Around):
    def forward(self, x: Tensor) -> Tensor:
        return x[..., ::2]


def not_a_module(hidden_size: int) -> str:
    return "nothing"


def of_gpt2(hidden_size: int, num_heads: int) -> nn.Module:
    """transformers' own attention, which decodes with its own cache."""
    config = GPT2Config(n_embd=hidden_size, n_head=num_heads, attn_pdrop=0.0, resid_pdrop=0.0)
    config._attn_implementation = "sdpa"
    return GPT2Attention(config, layer_idx=0)


class CacheWrittenLate(nn.Module):
    """The keys of a token reach the cache one token too late."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.inside = of_gpt2(hidden_size, num_heads)

    def forward(self, x: Tensor, keys_so_far: DynamicCache | None = None) -> Any:
        if keys_so_far is None:
            return self.inside(x)
        y = self.inside(x, **{CACHE_ARGUMENT: keys_so_far})[0]
        if keys_so_far.get_seq_length() > 2:
            keys_so_far.crop(-1)
        return y, None
