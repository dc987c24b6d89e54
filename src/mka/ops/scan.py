"""The session average: an exponential moving average as a parallel scan.

    y_t = a y_{t-1} + x_t          weighted sum of the past
    n_t = a n_{t-1} + 1            sum of the weights
    m_t = y_t / n_t                a true weighted mean from the first token on

This is the m_t of a m_{t-1} + (1 - a) x_t divided by 1 - a^t. The row is cut into
blocks of `block_size` tokens. One pass over the offsets inside a block runs all blocks
side by side; the last sums of the blocks are scanned in the same way, one level up, and
carried back in. Nothing flows from a later token to an earlier one, so causality is
exact for every finite value.

Shapes: x (B, T, C), decay a (C,), each in (0, 1).
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mka.ops.precision import no_autocast, upcast


def causal_average(x: Tensor, decay: Tensor) -> Tensor:
    """m (B, T, C): the exponentially weighted mean of x_1..x_t at every t, in float32
    or better.

    x (B, T, C), decay (C,) with entries in (0, 1); differentiable in both.
    """
    # In bfloat16 a running sum over thousands of tokens would stop growing.
    with no_autocast(x):
        x = upcast(x)
        return _causal_average(x, decay.to(x.dtype))


def carry_average(mean: Tensor, before: Tensor, count: Tensor, decay: Tensor) -> Tensor:
    """The means (B, T, C) at tokens that continue a row.

    Args:
        mean: (B, T, C), the means over the new tokens alone (`causal_average`).
        before: (B, C), the mean of the tokens before them.
        count: (B or 1,), how many tokens came before; 0 means none.
        decay: (C,), each in (0, 1).

    With N(n) = 1 + a + ... + a^(n-1), the mean at the t-th new token (t = 1, 2, ...) is

        (N(t) mean_t + a^t N(count) before) / N(count + t)
    """
    # N(n) = (1 - a^n) / (1 - a), whose denominator cancels. 1 - a^n is -expm1(n log a):
    # a plain difference would lose its digits for a near 1.
    with no_autocast(mean):
        rate = torch.log(decay)
        t = torch.arange(1, mean.shape[1] + 1, device=mean.device, dtype=mean.dtype)[:, None]
        n = count.to(mean.dtype)[:, None, None]
        carried = torch.exp(t * rate) * -torch.expm1(n * rate) * before.to(mean.dtype).unsqueeze(1)
        return (-torch.expm1(t * rate) * mean + carried) / -torch.expm1((n + t) * rate)


def decayed_sum(x: Tensor, decay: Tensor, reverse: bool = False) -> Tensor:
    """y_t = a y_{t-1} + x_t along dimension 1; with `reverse`, y_t = a y_{t+1} + x_t.

    x (B, T, C) -> (B, T, C). It writes in place, so it is not differentiable by itself.
    """
    tokens = x.shape[1]
    size = block_size(tokens)
    if tokens % size:
        x = pad(x, (0, 0, 0, -tokens % size))
    x = x.unflatten(1, (-1, size))
    y = torch.empty_like(x)
    # Step i handles offset i of all blocks at once: `size` small operations instead of
    # T.
    order = range(size - 1, -1, -1) if reverse else range(size)
    inputs, sums = x.unbind(2), y.unbind(2)
    sums[order[0]].copy_(inputs[order[0]])
    for before, here in pairwise(order):
        torch.addcmul(inputs[here], sums[before], decay, out=sums[here])
    # What a block inherits from those before it: their scanned sum, decayed by one more
    # power of a at every offset. One step of the scan over blocks spans `size` tokens,
    # hence decay**size.
    if y.shape[1] > 1:
        powers = _powers(decay, size).flip(0) if reverse else _powers(decay, size)
        ends, rest = (y[:, 1:, 0], y[:, :-1]) if reverse else (y[:, :-1, -1], y[:, 1:])
        rest.addcmul_(decayed_sum(ends, decay**size, reverse).unsqueeze(2), powers)
    return y.flatten(1, 2)[:, :tokens]


def block_size(tokens: int) -> int:
    """Tokens per block of the scan: a power of two near half the square root of T, at
    least 8, so that steps are few and each has many blocks to work on."""
    return 2 ** max(3, (tokens.bit_length() - 1) // 2 - 1)


def _powers(decay: Tensor, count: int) -> Tensor:
    """a^1, ..., a^count: (count, C)."""
    return decay ** torch.arange(1, count + 1, device=decay.device, dtype=decay.dtype)[:, None]


def _weight_sums(tokens: int, decay: Tensor) -> Tensor:
    """n_t = a^0 + ... + a^(t-1), (T, C): the sum inside the block plus the carried sum,
    decayed."""
    # Summed in blocks as the values are. (1 - a^t) / (1 - a) would lose its digits for
    # a near 1.
    size = block_size(tokens)
    blocks = -(-tokens // size)
    powers = _powers(decay, size)
    inside = 1 + powers.cumsum(0) - powers
    ends = decayed_sum(inside[-1].expand(1, blocks, -1), decay**size)[0]
    carried = pad(ends[:-1], (0, 0, 1, 0))
    return torch.addcmul(inside, carried.unsqueeze(1), powers).flatten(0, 1)[:tokens]


# Custom operators, so that torch.compile calls them as they are: it cannot trace the
# writes into slices.


@torch.library.custom_op("mka::causal_average", mutates_args=())
def _causal_average(x: Tensor, decay: Tensor) -> Tensor:
    return _divided(decayed_sum(x, decay), _weight_sums(x.shape[1], decay))


@torch.library.custom_op("mka::causal_average_backward", mutates_args=())
def _causal_average_backward(
    grad: Tensor, mean: Tensor, decay: Tensor, learned: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of x and, if `learned`, of decay, from that of the mean."""
    # x reaches the loss through y: dL/dx_t = dL/dy_t = a dL/dy_{t+1} + g_t / n_t, the
    # same scan, reversed.
    weights = _weight_sums(mean.shape[1], decay)
    scaled = grad / weights
    grad_x = decayed_sum(scaled, decay, reverse=True).contiguous()
    if not learned:
        return grad_x, torch.zeros_like(decay)
    # a reaches it through y_t = a y_{t-1} + x_t and through n_t, where dn_t/da is a
    # decayed sum itself: dn_t/da = a dn_{t-1}/da + n_{t-1}.
    sums = mean * weights
    grad_decay = (grad_x[:, 1:] * sums[:, :-1]).sum((0, 1))
    slopes = decayed_sum(weights[None, :-1], decay)[0]
    grad_decay -= ((scaled[:, 1:] * mean[:, 1:]).sum(0) * slopes).sum(0)
    return grad_x, grad_decay


def _divided(sums: Tensor, weights: Tensor) -> Tensor:
    """sums / weights, contiguous, as the operator's shape function promises."""
    # In place where possible: one copy of (B, T, C) less.
    return sums.div_(weights) if sums.is_contiguous() else sums / weights


@_causal_average.register_fake
def _average_shape(x: Tensor, decay: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@_causal_average_backward.register_fake
def _backward_shapes(
    grad: Tensor, mean: Tensor, decay: Tensor, learned: bool
) -> tuple[Tensor, Tensor]:
    return mean.new_empty(mean.shape), torch.empty_like(decay)


def _keep(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(output, inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    mean, decay = ctx.saved_tensors
    return torch.ops.mka.causal_average_backward(grad, mean, decay, ctx.needs_input_grad[1])


_causal_average.register_autograd(_backward, setup_context=_keep)
