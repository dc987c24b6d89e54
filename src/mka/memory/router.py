"""The learned mix of the memory levels."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from mka.ops.precision import no_autocast, upcast

LOCAL, SESSION, LONG_TERM = range(3)
NUM_LEVELS = 3
START_BIAS = (1.0, 0.0, 0.0)
"""The mix every token starts from where all levels exist: 0.58, 0.21, 0.21."""


class WideLinear(nn.Linear):
    """A linear layer that computes in float32 or better, whatever its weights are kept in."""

    def forward(self, input: Tensor) -> Tensor:
        bias = None if self.bias is None else upcast(self.bias)
        return linear(upcast(input), upcast(self.weight), bias)


class Router(nn.Module):
    """lambda_t = softmax(MLP(q_t)) over the levels that exist at t, in float32 or better.

    The result is blended with the local level alone by a gate g, e_1 + g (lambda - e_1); from scratch g is fixed at 1.
    The output layer starts at zero weight and START_BIAS, so training starts from a known mix.
    """

    gate: Tensor

    def __init__(self, query_size: int, router_size: int) -> None:
        super().__init__()
        self.hidden = WideLinear(query_size, router_size)
        self.output = WideLinear(router_size, NUM_LEVELS)
        self.register_buffer("gate", torch.ones(()))
        self.reset_output()

    def learn_gate(self) -> None:
        """Make the gate a parameter that starts at 0: the attention is then the local level's alone, and can change."""
        gate = torch.zeros_like(self.gate)
        del self.gate
        self.gate = nn.Parameter(gate)

    def reset_output(self) -> None:
        with torch.no_grad():
            self.output.weight.zero_()
            self.output.bias.copy_(torch.tensor(START_BIAS))

    def forward(self, q: Tensor, exists: Tensor) -> Tensor:
        """q (B, T, H, D) before any rotary embedding, exists (T, M) or (B, T, M) bool -> lambda (B, T, M).

        The local level always exists, so the weights always sum to one.
        """
        with no_autocast(q):
            logits = self.output(silu(self.hidden(upcast(q).flatten(2))))
            mix = upcast(logits).masked_fill(~exists, -torch.inf).softmax(-1)
            local = torch.zeros_like(mix)
            local[..., LOCAL] = 1
            return torch.lerp(local, mix, self.gate.to(mix.dtype))
