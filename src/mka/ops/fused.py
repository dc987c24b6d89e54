"""Attention that also returns the log-sum-exp of its scores, with a gradient through
both: the memory levels are merged by it.

    o = softmax(s) v        lse = logsumexp(s)        s = scale q k^T where the mask is True

The backward kernels accept no gradient of lse, and need none: with p = softmax(s), do
and dlse given,

    ds = p (do v^T - delta)        delta = do . o - dlse

and one extra channel, v' = [v, 0], do' = [do, dlse], o' = [o, -1], turns the kernels'
usual delta = do' . o' into exactly that. The kernels are torch's own, which store no
scores: its flash kernel on a CPU, its memory-efficient one (FlashAttention's algorithm
with any mask) on CUDA. Where there is no kernel, as for float64 on CUDA, the scores are
stored.

Shapes: q (B, H, T, D), k and v (B, G, S, D), G divides H, mask broadcasts to (B, H, T,
    S).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mka.ops.precision import wide, without_autocast

FUSED = ("cpu", "cuda")
"""Device types with a kernel that returns the log-sum-exp."""
ON_CUDA = (torch.float32, torch.bfloat16, torch.float16)
"""Dtypes that CUDA's kernel accepts."""
CHANNELS = 8
"""Channels are padded to a multiple of this, and so are the extra ones of the backward
pass."""
UNMASKED, CAUSAL = 0, 1
"""Values of `custom_mask_type` in CUDA's kernel."""
SUMS, BIASES = 32, 16
"""Alignment in CUDA's kernel, in numbers: the log-sum-exps of a head begin at multiples
of the first, the mask of a query at multiples of the second."""


@torch.library.custom_op("mka::attention_with_lse", mutates_args=())
@without_autocast
def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Returns o (B, H, T, D) in q's dtype and lse (B, H, T), float32 or better.

    Args:
        q: (B, H, T, D).
        k, v: (B, G, S, D).
        mask: bool, broadcasts to (B, H, T, S), True where a key is seen; None: causal,
            S = T.
        scale: factor of the scores.

    A query that sees no key reads zeros, and its lse is -inf.
    """
    # For a query that sees nothing the CPU's kernel reports an lse of 0: here it is
    # always -inf.
    if is_fused(q):
        o, lse = (forward_on_cuda if q.is_cuda else forward_on_cpu)(q, k, v, mask, scale)
        return o, lse if mask is None else lse.masked_fill(~mask.any(-1), -torch.inf)
    scores = all_scores(q, k, mask, scale)
    lse = scores.logsumexp(-1)
    # With 0 for an lse of -inf, exp(-inf - 0) = 0: zeros are read, where -inf - -inf
    # would be NaN.
    p = (scores - lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1)).exp()
    return (p @ by_heads(v, q)).to(q.dtype), lse


@torch.library.custom_op("mka::attention_with_lse_backward", mutates_args=())
@without_autocast
def attention_with_lse_backward(
    grad: Tensor,
    grad_of_lse: Tensor | None,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v, in their shapes and dtypes."""
    width, groups = q.shape[-1], k.shape[1]
    # As in the forward pass, where nothing is seen, every weight is exp(-inf - 0) = 0.
    lse = lse.masked_fill(lse == -torch.inf, 0)
    if not is_fused(q):
        # No kernel: the formulas of the module's docstring, with stored scores.
        grad, keys, values = grad.to(lse.dtype), by_heads(k, q), by_heads(v, q)
        p = (all_scores(q, k, mask, scale) - lse.unsqueeze(-1)).exp()
        delta = (grad * o).sum(-1) - (0 if grad_of_lse is None else grad_of_lse)
        slope = p * (grad @ values.mT - delta.unsqueeze(-1)) * scale
        dq, dk, dv = slope @ keys, slope.mT @ q.to(lse.dtype), p.mT @ grad
    else:
        k, v = (shared(x, q) for x in (k, v))
        # The extra channel of the module's docstring. The rest of the CHANNELS is
        # zeros, which keep the width a multiple that the kernels accept.
        if grad_of_lse is not None:
            q, k, v = (pad(x, (0, CHANNELS)) for x in (q, k, v))
            grad = torch.cat([grad, grad_of_lse.to(grad.dtype).unsqueeze(-1)], dim=-1)
            o = pad(o, (0, 1), value=-1.0)
            grad, o = (pad(x, (0, CHANNELS - 1)) for x in (grad, o))
        grads = (backward_on_cuda if q.is_cuda else backward_on_cpu)(
            grad, o, lse, q, k, v, mask, scale
        )
        dq, dk, dv = (x[..., :width] for x in grads)
    # Keys repeated for the heads of a group: their gradients add up.
    if dk.shape[1] != groups:
        dk, dv = (x.unflatten(1, (groups, -1)).sum(2) for x in (dk, dv))
    return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()


def is_fused(q: Tensor) -> bool:
    """Whether there is a kernel for queries of this device and dtype."""
    return q.device.type in FUSED and (not q.is_cuda or q.dtype in ON_CUDA)


def forward_on_cpu(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """o and lse by the CPU's flash kernel, without dropout."""
    q, k, v = (in_channels(x) for x in (q, k, v))
    bias = None if mask is None else additive(mask, q.dtype)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return kernel(q, k, v, 0.0, mask is None, attn_mask=bias, scale=scale)


def backward_on_cpu(
    grad: Tensor,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Sequence[Tensor]:
    """The gradients of q, k and v by the CPU's flash kernel; k and v have H heads."""
    q, k, v = (in_channels(x) for x in (q, k, v))
    bias = None if mask is None else additive(mask, q.dtype)
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return kernel(grad, q, k, v, o, lse, 0.0, mask is None, attn_mask=bias, scale=scale)


def forward_on_cuda(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """o and lse by CUDA's memory-efficient kernel, without what it pads them with."""
    # The padding of in_rows and of the log-sum-exps (to multiples of SUMS) is cut off
    # again.
    width, tokens = q.shape[-1], q.shape[2]
    bias, kind = spread(mask, q, k), CAUSAL if mask is None else UNMASKED
    rows = [in_rows(x) for x in (q, shared(k, q), shared(v, q))]
    kernel = torch.ops.aten._efficient_attention_forward
    o, lse, *_ = kernel(*rows, bias, None, None, None, None, 0.0, kind, True, scale=scale)
    return o.transpose(1, 2)[..., :width], lse[..., :tokens]


def backward_on_cuda(
    grad: Tensor,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Sequence[Tensor]:
    """The gradients of q, k and v by CUDA's memory-efficient kernel; k and v have H
    heads."""
    (tokens, width), slots = q.shape[2:], k.shape[2]
    bias, kind = spread(mask, q, k), CAUSAL if mask is None else UNMASKED
    grad, q, k, v, o = (in_rows(x) for x in (grad, q, k, v, o))
    # The kernel assumes a contiguous o and does not check it.
    o = o.contiguous()
    # Queries that only pad get exp(s - inf) = 0 as weights.
    lse = pad(lse, (0, -tokens % SUMS), value=torch.inf)
    # Seed and offset of a dropout that is off; the kernel wants them all the same.
    unused = torch.zeros((), dtype=torch.int64, device=q.device)
    kernel = torch.ops.aten._efficient_attention_backward
    grads = kernel(
        grad,
        q,
        k,
        v,
        bias,
        o,
        None,
        None,
        tokens,
        slots,
        lse,
        0.0,
        unused,
        unused,
        kind,
        False,
        scale=scale,
    )
    return [x.transpose(1, 2)[..., :width] for x in grads[:3]]


def in_channels(x: Tensor) -> Tensor:
    """x with its channels contiguous, which the CPU's kernel assumes and does not
    check."""
    return x if x.stride(-1) == 1 else x.contiguous()


def in_rows(x: Tensor) -> Tensor:
    """x (B, H, T, D) as CUDA's kernel reads it: (B, T, H, D'), where D' and the address
    of every vector, in numbers, are multiples of CHANNELS."""
    x = x.transpose(1, 2)
    if x.shape[-1] % CHANNELS:
        return pad(x, (0, -x.shape[-1] % CHANNELS))
    strides, begins = x.stride(), x.storage_offset()
    whole = strides[-1] == 1 and not any(number % CHANNELS for number in (*strides[:-1], begins))
    return x if whole else x.contiguous()


def spread(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The mask as CUDA's kernel reads it: (B, H, T, S), to be added to the scores."""
    if mask is None:
        return None
    slots = k.shape[2]
    # Padded in memory and then sliced: the rows keep their aligned stride.
    bias = additive(pad(mask, (0, -slots % BIASES)), q.dtype)
    return bias[..., :slots].expand(*q.shape[:3], slots)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The bool mask as numbers to add to the scores: 0 where True, -inf where False."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def shared(x: Tensor, q: Tensor) -> Tensor:
    """(B, G, S, D) -> (B, H, S, D): each head gets the keys of its group; a view where
    G is 1 or H."""
    groups, heads = x.shape[1], q.shape[1]
    # expand() copies nothing; flatten() does where there are several groups, because
    # the kernels called here do not take G heads of keys.
    return (
        x
        if groups == heads
        else x.unsqueeze(2).expand(-1, -1, heads // groups, -1, -1).flatten(1, 2)
    )


def by_heads(x: Tensor, q: Tensor) -> Tensor:
    """`shared`, float32 or better."""
    return shared(x.to(wide(x.dtype)), q)


def all_scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """The scores (B, H, T, S), float32 or better, -inf where a key is not seen."""
    scores = q.to(wide(q.dtype)) @ by_heads(k, q).mT * scale
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
    return scores.masked_fill(~mask, -torch.inf)


@attention_with_lse.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[:3], dtype=wide(q.dtype))


@attention_with_lse_backward.register_fake
def _(
    grad: Tensor,
    grad_of_lse: Tensor | None,
    o: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv


def keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save for `differentiate` what it needs."""
    q, k, v, ctx.mask, ctx.scale = inputs
    # An lse that nothing depends on gets None, and the extra channel is not computed.
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, q, k, v)


def differentiate(
    ctx: Any, grad: Tensor | None, grad_of_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The gradients of the five arguments of `attention_with_lse`, from those of its
    two results."""
    o, *others = ctx.saved_tensors
    grad = torch.zeros_like(o) if grad is None else grad.contiguous()
    return (
        *attention_with_lse_backward(grad, grad_of_lse, o, *others, ctx.mask, ctx.scale),
        None,
        None,
    )


attention_with_lse.register_autograd(differentiate, setup_context=keep)
