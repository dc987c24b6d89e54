"""Latent attention: the absorbed form over whole rows, and the cost of the expanded form."""

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import checks
from mka.attention import MultiHeadLatentAttention

TOKENS = 21


def latent(
    bias: bool = False, rope: bool = False, q_rank: int | None = None
) -> MultiHeadLatentAttention:
    rotary = checks.ROTARY if rope else None
    options = {
        "bias": bias,
        "q_lora_rank": q_rank,
        "kv_lora_rank": 5,
        "local_window": None,
        "rotary": rotary,
    }
    attn = checks.make(
        "mla", "literal", **options, qk_rope_head_dim=rotary.head_dim if rotary else 0
    )
    assert isinstance(attn, MultiHeadLatentAttention)
    return attn


def absorbed(attn: MultiHeadLatentAttention, x: Tensor) -> Tensor:
    """Scores against z itself, with Wuk folded into the query; the mix of z through Wuv: what
    decoding will do."""
    positions = torch.arange(x.shape[1])
    q, (z, k_rope) = attn.queries(x, positions), attn.latent(x, positions)
    nope, rope = q[..., : attn.head_dim], q[..., attn.head_dim :]
    w_uk, w_uv = (
        w.weight.unflatten(0, (attn.num_heads, -1)) for w in (attn.k_up_proj, attn.v_up_proj)
    )
    scores = torch.einsum("bthd,hdr,bsr->bhts", nope, w_uk, z)
    if k_rope is not None:
        scores = scores + torch.einsum("bthd,bsd->bhts", rope, k_rope.squeeze(2))
    future = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
    weights = (scores * q.shape[-1] ** -0.5).masked_fill(future, -torch.inf).softmax(-1)
    return attn.o_proj(torch.einsum("bhts,bsr,hdr->bthd", weights, z, w_uv).flatten(2))


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("q_rank", [None, 6])
def test_absorbed_equals_expanded(rope: bool, q_rank: int | None) -> None:
    attn, x = latent(rope=rope, q_rank=q_rank), checks.rows(2, TOKENS)
    checks.close(attn(x)[0], absorbed(attn, x))


@pytest.mark.parametrize("rope", [False, True])
@pytest.mark.parametrize("q_rank", [None, 6])
@pytest.mark.parametrize("bias", [False, True])
def test_flops_of_the_linear_layers_of_the_expanded_form(
    bias: bool, rope: bool, q_rank: int | None
) -> None:
    attn = latent(bias, rope, q_rank)
    with FlopCounterMode(display=False) as counter:
        attn(checks.rows(2, TOKENS))
    counts = counter.get_flop_counts()["Global"]
    linear = sum(
        flops for op, flops in counts.items() if op in (torch.ops.aten.mm, torch.ops.aten.addmm)
    )
    attention_of_one_key = 2 * (attn.q_size + attn.hidden_size)
    assert linear == 2 * TOKENS * (attn.flops_per_token(1) - attention_of_one_key)


@pytest.mark.parametrize("rope", [False, True])
def test_every_head_reads_the_one_latent_that_a_cache_would_hold(rope: bool) -> None:
    attn, x = latent(rope=rope), checks.rows(2, TOKENS)
    z, k_rope = attn.latent(x, torch.arange(TOKENS))
    held = z[0, 0].numel() + (0 if k_rope is None else k_rope[0, 0].numel())
    assert attn.state_nbytes(1, 1) == held * 8
    assert held < 2 * attn.hidden_size
