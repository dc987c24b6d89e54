"""The learned mix of the memory levels."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from mka.ops.precision import no_autocast, upcast

LOCAL, SESSION, LONG_TERM = range(3)
NUM_LEVELS = 3
START_WEIGHTS = (3.0, 0.0, 0.0)
"""Logits of the levels' weights at the start; where all levels exist, they are 0.91, 0.045 and 0.045."""
START_BIASES = (0.0, 0.0, 0.0)
"""The same of the levels' biases, which are added to scores: one softmax finds by itself what matches."""


class WideLinear(nn.Linear):
    """A linear layer that computes in float32 or better, whatever its weights are kept in."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else upcast(self.bias)
        return linear(upcast(input), upcast(self.weight), bias)


class Router(nn.Module):
    """r_t = MLP(q_t): a logit for each level, for every head or for all heads at once, in float32 or better.

    `weights` makes of them the weights of levels that were read apart, `biases` those of levels that are read by one
    softmax. The output layer starts at zero weight, so training starts from a known mix. Conversions of pretrained
    models have a gate g that starts at 0 (`learn_gate`) and shuts what a pretrained model does not have: the memories,
    where levels are weighed; the session average, where one softmax finds by itself what is of use.
    """

    gate: Tensor

    def __init__(self, query_size: int, router_size: int, num_heads: int | None = None) -> None:
        """num_heads None: one mix for all heads, by weights."""
        super().__init__()
        self.num_heads = num_heads
        self.start = START_WEIGHTS if num_heads is None else START_BIASES
        self.hidden = WideLinear(query_size, router_size)
        self.output = WideLinear(router_size, NUM_LEVELS * (num_heads or 1))
        self.register_buffer("gate", torch.ones(()))
        self.reset_output()

    def learn_gate(self) -> None:
        """Make the gate a parameter that starts at 0."""
        gate = torch.zeros_like(self.gate)
        del self.gate
        self.gate = nn.Parameter(gate)

    def reset_output(self) -> None:
        with torch.no_grad():
            self.output.weight.zero_()
            self.output.bias.copy_(torch.tensor(self.start).repeat(self.num_heads or 1))

    def logits(self, q: Tensor) -> Tensor:
        with no_autocast(q):
            return self.output(silu(self.hidden(upcast(q).flatten(2))))

    def weights(self, q: Tensor, exists: Tensor) -> Tensor:
        """q (B, T, H, D) before any rotary embedding, exists (T, M) or (B, T, M) bool -> lambda (B, T, M).

        The softmax over the levels that exist at t, blended with the local level alone by the gate: e_1 + g (lambda -
        e_1). The local level always exists, so the weights always sum to one.
        """
        mix = self.logits(q).masked_fill(~exists, -torch.inf).softmax(-1)
        local = torch.zeros_like(mix)
        local[..., LOCAL] = 1
        return torch.lerp(local, mix, self.gate.to(mix.dtype))

    def biases(self, q: Tensor) -> Tensor:
        """q (B, T, H, D) before any rotary embedding -> b (B, T, H, M), 0 for the local level: b_l = r_l - r_1."""
        logits = self.logits(q).unflatten(-1, (-1, NUM_LEVELS))
        return logits - logits[..., LOCAL, None]

    def session_factor(self) -> Tensor | None:
        """How much of the session average counts where levels are read jointly; None: all of it.

        It is never below 0. Its gradient is that of the gate there too, so that a gate can come back.
        """
        if not isinstance(self.gate, nn.Parameter):
            return None
        return self.gate + (self.gate.clamp(min=0) - self.gate).detach()
