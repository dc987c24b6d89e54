"""The router: a learned mix of the memory levels."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from mka.ops.precision import no_autocast, upcast

LOCAL, SESSION, LONG_TERM = range(3)
NUM_LEVELS = 3
START_WEIGHTS = (3.0, 0.0, 0.0)
"""Initial logits if levels are weighed: where all three exist, the weights are 0.91,
0.045 and 0.045."""
START_BIASES = (0.0, 0.0, 0.0)
"""Initial logits if they become biases of scores: no bias, since one softmax finds by
itself what matches."""


class WideLinear(nn.Linear):
    """A linear layer that computes in float32 or better, whatever the dtype of its
    weights."""

    def forward(self, input: Tensor) -> Tensor:
        """input (..., in_features) -> (..., out_features), float32 or better."""
        # The weights are upcast, not only the input: a model in bfloat16 keeps them in
        # bfloat16.
        bias = None if self.bias is None else upcast(self.bias)
        return linear(upcast(input), upcast(self.weight), bias)


class Router(nn.Module):
    """r_t = MLP(q_t): a logit for each of M = 3 levels, in float32 or better.

    Args:
        query_size: H D, the size of a token's query over all heads.
        router_size: width of the hidden layer.
        num_heads: H, for logits of each head that become biases of scores (`biases`).
            Default: None, one set for all heads that becomes weights of levels read
            separately (`weights`).

    Conversions of pretrained models have a gate g that starts at 0 (`learn_gate`) and
    shuts off what the pretrained model did not have: with weights, both memories; with
    biases, only the session average, since one softmax finds by itself which retrieved
    tokens match.
    """

    gate: Tensor

    def __init__(self, query_size: int, router_size: int, num_heads: int | None = None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.start = START_WEIGHTS if num_heads is None else START_BIASES
        self.hidden = WideLinear(query_size, router_size)
        self.output = WideLinear(router_size, NUM_LEVELS * (num_heads or 1))
        # A buffer, so that it moves with the module, until a conversion makes it a
        # parameter.
        self.register_buffer("gate", torch.ones(()))
        self.reset_output()

    def learn_gate(self) -> None:
        """Make the gate a parameter that starts at 0, shut."""
        # A buffer of that name has to go before a parameter can take its place.
        gate = torch.zeros_like(self.gate)
        del self.gate
        self.gate = nn.Parameter(gate)

    def reset_output(self) -> None:
        """Set the output layer to its start: zero weights, so that training starts from
        a known mix, and biases that give it."""
        with torch.no_grad():
            self.output.weight.zero_()
            self.output.bias.copy_(torch.tensor(self.start).repeat(self.num_heads or 1))

    def logits(self, q: Tensor) -> Tensor:
        """q (B, T, H, D) before any rotary embedding -> (B, T, M), or (B, T, H M) per
        head."""
        with no_autocast(q):
            return self.output(silu(self.hidden(upcast(q).flatten(2))))

    def weights(self, q: Tensor, exists: Tensor) -> Tensor:
        """The weights lambda (B, T, M) of the levels.

        q (B, T, H, D) before any rotary embedding; exists (T, M) or (B, T, M) bool,
        False for levels that have nothing to offer at t. The softmax over the others is
        blended with the local level alone by the gate: e_1 + g (lambda - e_1).
        """
        # The local level always exists, so no softmax is over -inf alone.
        mix = self.logits(q).masked_fill(~exists, -torch.inf).softmax(-1)
        local = torch.zeros_like(mix)
        local[..., LOCAL] = 1
        return torch.lerp(local, mix, self.gate.to(mix.dtype))

    def biases(self, q: Tensor) -> Tensor:
        """The biases b_l = r_l - r_1 (B, T, H, M), 0 for the local level.

        q (B, T, H, D) before any rotary embedding.
        """
        # A softmax over levels ignores a common shift, so the local level can be the
        # reference.
        logits = self.logits(q).unflatten(-1, (-1, NUM_LEVELS))
        return logits - logits[..., LOCAL, None]

    def session_factor(self) -> Tensor | None:
        """The factor () of the session level's weight where levels are read jointly;
        None: 1.

        It is the gate, but never below 0.
        """
        if not isinstance(self.gate, nn.Parameter):
            return None
        # clamp() alone has no gradient below 0, where a gate could then never come back
        # from.
        return self.gate + (self.gate.clamp(min=0) - self.gate).detach()
