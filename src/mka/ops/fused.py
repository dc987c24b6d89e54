"""Attention that also returns the log-sum-exp of its scores, with a gradient through both: what levels are merged by.

    o = softmax(s) v        lse = logsumexp(s)        s = scale q k^T where the mask is True

The kernels' backward takes no gradient of lse, and needs none: with p = softmax(s), do and dlse given,

    ds = p (do v^T - delta)        delta = do . o - dlse

and a channel more than there is, v' = [v, 0], do' = [do, dlse], o' = [o, -1], makes exactly that of the usual
delta = do' . o'. On a CPU the kernel is torch's own, which stores no scores; elsewhere they are stored.

Shapes: q (B, H, T, D), k and v (B, G, S, D), G divides H, mask broadcasts to (B, H, T, S).
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from mka.ops.precision import wide, without_autocast

FUSED = ("cpu",)
"""Kinds of device whose kernel returns the log-sum-exp."""
CHANNELS = 8
"""Channels are added in so many, the width that a vector unit likes."""


@torch.library.custom_op("mka::attention_with_lse", mutates_args=())
@without_autocast
def attention_with_lse(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Returns o (B, H, T, D) in q's dtype and lse (B, H, T), float32 or better.

    mask: bool, None: causal, S = T. A query that sees nothing reads zeros, and its lse is -inf.
    """
    if q.device.type in FUSED:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # it takes that as given
        o, lse = kernel(q, k, v, 0.0, mask is None, attn_mask=additive(mask, q.dtype), scale=scale)
        return o, lse if mask is None else lse.masked_fill(~mask.any(-1), -torch.inf)
    scores = all_scores(q, k, mask, scale)
    lse = scores.logsumexp(-1)
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
    """The gradients of q, k and v."""
    width, groups = q.shape[-1], k.shape[1]
    lse = lse.masked_fill(lse == -torch.inf, 0)  # where nothing is seen, every weight is exp(-inf)
    if q.device.type not in FUSED:
        grad, keys, values = grad.to(lse.dtype), by_heads(k, q), by_heads(v, q)
        p = (all_scores(q, k, mask, scale) - lse.unsqueeze(-1)).exp()
        delta = (grad * o).sum(-1) - (0 if grad_of_lse is None else grad_of_lse)
        slope = p * (grad @ values.mT - delta.unsqueeze(-1)) * scale
        dq, dk, dv = slope @ keys, slope.mT @ q.to(lse.dtype), p.mT @ grad
    else:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        if k.shape[1] != q.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // groups, dim=1) for x in (k, v))
        if grad_of_lse is not None:
            q, k, v = (pad(x, (0, CHANNELS)) for x in (q, k, v))
            grad = torch.cat([grad, grad_of_lse.to(grad.dtype).unsqueeze(-1)], dim=-1)
            o = pad(o, (0, 1), value=-1.0)
            grad, o = (pad(x, (0, CHANNELS - 1)) for x in (grad, o))
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        grads = kernel(grad, q, k, v, o, lse, 0.0, mask is None, attn_mask=additive(mask, q.dtype), scale=scale)
        dq, dk, dv = (x[..., :width] for x in grads)
    if dk.shape[1] != groups:
        dk, dv = (x.unflatten(1, (groups, -1)).sum(2) for x in (dk, dv))
    return dq.to(q.dtype).contiguous(), dk.to(k.dtype).contiguous(), dv.to(v.dtype).contiguous()


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The mask as the CPU's kernel takes it: added to the scores, in their dtype."""
    return None if mask is None else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def by_heads(x: Tensor, q: Tensor) -> Tensor:
    """(B, G, S, D) -> (B, H, S, D), float32 or better."""
    return x.to(wide(x.dtype)).repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def all_scores(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
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
    q, k, v, ctx.mask, ctx.scale = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*output, q, k, v)


def differentiate(ctx: Any, grad: Tensor | None, grad_of_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    o, *others = ctx.saved_tensors
    grad = torch.zeros_like(o) if grad is None else grad.contiguous()
    return *attention_with_lse_backward(grad, grad_of_lse, o, *others, ctx.mask, ctx.scale), None, None


attention_with_lse.register_autograd(differentiate, setup_context=keep)
