"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    x -- Wdkv --> norm --> z (R) --+-- Wuk --> keys, H heads of D ----+
    |                              +-- Wuv --> values, H heads of D   |
    +-- Wkr ---- rotary ------------> k_rope (1 head, shared) --------+
    x -- Wq (or Wdq, norm, Wuq) ----> q = [q_nope ; q_rope]    scale 1 / sqrt(D + D_rope)

    k = [z Wuk ; k_rope]    v = z Wuv

A cache needs z and k_rope only: R + D_rope numbers per token, whatever H is. B rows, T
tokens, C hidden size, H heads, D head size (C / H unless given), R latent rank.
"""

import torch
from torch import Tensor, cat, einsum, nn
from torch.nn.modules import module

from mka.attention.base import Bias, CausalAttention, normalize
from mka.errors import InputError, check_whole
from mka.memory.entry import Entry
from mka.memory.local import attend_local, local_entries
from mka.memory.state import State
from mka.ops.rotary import RotaryEmbedding

LINEAR = nn.Linear.forward
"""torch's own forward as it was on import, to notice a later replacement."""
GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")
"""Where torch keeps the hooks that are called with every module."""
LATENT = ("latent", "latent")
"""The state's store, which is of keys and of values at once."""


class MultiHeadLatentAttention(CausalAttention):
    """Keys and values are expanded from one latent vector per token: x (B, T, C) -> y
    (B, T, C).

    Args:
        hidden_size: C, channels of x.
        num_heads: H, heads.
        kv_lora_rank: R, the size of the latent vector z. Default: None, 4 D, the ratio
            of the paper.
        q_lora_rank: rank of the queries' projection. Default: None, full rank.
        qk_rope_head_dim: D_rope, rotary channels of each query and of the one shared
            key; it must be the head_dim of `rotary`. Default: 0, none, for backbones
            with other positions.
        local_window: w, the latest tokens that a token attends to, itself included.
            Default: None, all.
        sink_tokens: first tokens of a row that every later token attends to, in
            addition to its window. Default: None, 4 or as many as fit; none without a
            window.
        head_dim: D, channels per head without the rotary ones. Default: None, C / H, so
            that H must divide C.
        bias: which projections have a bias: True (all), False (none), or "qkv" (all but
            the output projection). Default: False.
        rotary: the rotary embedding of the D_rope channels. Default: None, none.

    Raises ValueError for heads that do not divide, for sizes and ranks below 1, for
    sinks that do not fit the window, and for a rotary embedding of another size than
    qk_rope_head_dim.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        kv_lora_rank: int | None = None,
        q_lora_rank: int | None = None,
        qk_rope_head_dim: int = 0,
        local_window: int | None = None,
        sink_tokens: int | None = None,
        head_dim: int | None = None,
        bias: Bias = False,
        rotary: RotaryEmbedding | None = None,
    ) -> None:
        super().__init__(
            hidden_size, num_heads, num_heads, local_window, head_dim, bias, rotary, sink_tokens
        )
        check_whole("kv_lora_rank", kv_lora_rank, 1)
        check_whole("q_lora_rank", q_lora_rank, 1)
        if qk_rope_head_dim != (rotary.head_dim if rotary else 0):
            raise InputError(
                f"qk_rope_head_dim is {qk_rope_head_dim}; it must be the head_dim of rotary, "
                f"which is {rotary.head_dim if rotary else 'not given'}"
            )
        self.kv_lora_rank = kv_lora_rank or 4 * self.head_dim
        self.q_lora_rank = q_lora_rank
        # "qkv" gives a bias to all projections before the attention, those of latents
        # included.
        before = bool(bias)
        self.qk_rope_head_dim = qk_rope_head_dim
        self.q_size = num_heads * (self.head_dim + qk_rope_head_dim)
        if q_lora_rank is not None:
            self.q_down_proj = nn.Linear(hidden_size, q_lora_rank, bias=before)
            self.q_norm = nn.RMSNorm(q_lora_rank)
        self.q_proj = nn.Linear(q_lora_rank or hidden_size, self.q_size, bias=before)
        self.kv_down_proj = nn.Linear(hidden_size, self.kv_lora_rank, bias=before)
        self.kv_norm = nn.RMSNorm(self.kv_lora_rank)
        self.k_up_proj = nn.Linear(self.kv_lora_rank, self.inner_size, bias=before)
        self.v_up_proj = nn.Linear(self.kv_lora_rank, self.inner_size, bias=before)
        if qk_rope_head_dim:
            self.k_rope_proj = nn.Linear(hidden_size, qk_rope_head_dim, bias=before)
        self.o_proj = self.output_projection()

    def mix(self, x: Tensor, positions: Tensor | None, state: State | None) -> Tensor:
        """Query, latent, attend, project back; see `CausalAttention.mix`."""
        q = self.queries(x, positions)
        z, k_rope = self.latent(x, positions)
        # Where all tokens are new, keys and values are expanded once for each of them.
        # Where a cache holds many latents, expanding them all for a few queries would
        # cost far more than the absorbed form, which only plain layers allow.
        if state is None or state.is_fresh:
            if state is not None:
                state.write("latent", joined(z, k_rope))
            o = attend_local(q, *self.expanded(joined(z, k_rope)), self.window).values
        elif is_plain(self.k_up_proj) and is_plain(self.v_up_proj):
            o = self.absorbed(q, z, k_rope, state)
        else:
            latent = joined(z, k_rope)
            o = attend_local(
                q, latent, latent, self.window, state, LATENT, expand=self.expanded
            ).values
        return self.o_proj(o.flatten(2))

    def expanded(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """k (B, S, H, D + D_rope) and v (B, S, H, D) of latents (B, S, 1, R +
        D_rope)."""
        z, k_rope = latent[:, :, 0, : self.kv_lora_rank], latent[..., self.kv_lora_rank :]
        k = self.k_up_proj(z).unflatten(-1, (self.num_heads, -1))
        v = self.v_up_proj(z).unflatten(-1, (self.num_heads, -1))
        if self.rotary is not None:
            k = cat([k, k_rope.expand(-1, -1, self.num_heads, -1)], dim=-1)
        return k, v

    def absorbed(self, q: Tensor, z: Tensor, k_rope: Tensor | None, state: State) -> Tensor:
        """o (B, T, H, D) from latents alone: Wuk folded into the query, Wuv into the
        output.

        q (B, T, H, D + D_rope), z (B, T, R), k_rope (B, T, 1, D_rope). It reads the
        weights of Wuk and Wuv without calling these layers, so both must be plain
        (`is_plain`).
        """
        # q . (Wuk z) = (Wuk^T q) . z, so the latents serve as keys and values of a
        # single head. A bias of Wuk adds the same to all scores of a query, which a
        # softmax ignores.
        w_uk = self.k_up_proj.weight.unflatten(0, (self.num_heads, -1))
        w_uv = self.v_up_proj.weight.unflatten(0, (self.num_heads, -1))
        q = cat(
            [einsum("bthd,hdr->bthr", q[..., : self.head_dim], w_uk), q[..., self.head_dim :]],
            dim=-1,
        )
        # The scale is that of the expanded keys: the size of a latent has no part in
        # it.
        latent, scale = joined(z, k_rope), (self.head_dim + self.qk_rope_head_dim) ** -0.5
        read = attend_local(q, latent, latent, self.window, state, LATENT, scale).values
        o = einsum("bthr,hdr->bthd", read[..., : self.kv_lora_rank], w_uv)
        # The weights of a softmax add up to 1, so the bias of the values can be added
        # afterward.
        return (
            o
            if self.v_up_proj.bias is None
            else o + self.v_up_proj.bias.unflatten(0, (self.num_heads, -1))
        )

    def queries(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """Queries of x (B, T, C): (B, T, H, D + D_rope), their last D_rope channels
        rotated."""
        low = x if self.q_lora_rank is None else normalize(self.q_norm, self.q_down_proj(x))
        q = self.q_proj(low).unflatten(-1, (self.num_heads, -1))
        if self.rotary is None:
            return q
        return cat(
            [q[..., : self.head_dim], self.rotate(q[..., self.head_dim :], positions)], dim=-1
        )

    def latent(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What a cache keeps of x (B, T, C): z (B, T, R) and the shared rotary key (B,
        T, 1, D_rope), None without rotary embeddings."""
        z = normalize(self.kv_norm, self.kv_down_proj(x))
        if self.rotary is None:
            return z, None
        return z, self.rotate(self.k_rope_proj(x).unsqueeze(2), positions)

    @property
    def num_parameters(self) -> int:
        """Parameters, computed from the configuration."""
        c, r, rope, q_rank = (
            self.hidden_size,
            self.kv_lora_rank,
            self.qk_rope_head_dim,
            self.q_lora_rank,
        )
        shapes = [(q_rank or c, self.q_size), (c, r), (r, self.inner_size), (r, self.inner_size)]
        shapes += [(c, q_rank)] if q_rank else []
        shapes += [(c, rope)] if rope else []
        # The last two terms are the norms of the latents.
        return self.linear_parameters(*shapes) + r + (q_rank or 0)

    def state_entries(self, dtype: torch.dtype) -> dict[str, Entry]:
        """The store of a state: z and the shared rotary key, side by side, of the
        tokens in the window and of the sinks."""
        return local_entries(
            LATENT, (1, self.kv_lora_rank + self.qk_rope_head_dim), dtype, self.window
        )

    def flops_per_token(self, context: int) -> int:
        """FLOPs of the forward pass of one token, the last of `context` (see
        `CausalAttention`)."""
        c, r, rope, q_rank = (
            self.hidden_size,
            self.kv_lora_rank,
            self.qk_rope_head_dim,
            self.q_lora_rank,
        )
        queries = 2 * (c * q_rank + q_rank * self.q_size if q_rank else c * self.q_size)
        inner = self.inner_size
        # Keys and values are counted as expanded once per token, as in one long call.
        latent = 2 * c * (r + rope) + 4 * r * inner
        return (
            queries
            + latent
            + 2 * inner * c
            + 2 * (self.q_size + inner) * self.keys_attended(context)
        )


def joined(z: Tensor, k_rope: Tensor | None) -> Tensor:
    """z (B, T, R) and k_rope (B, T, 1, D_rope) side by side, as the cache keeps them:
    (B, T, 1, R + D_rope)."""
    z = z.unsqueeze(2)
    return z if k_rope is None else cat([z, k_rope.to(z.dtype)], dim=-1)


def is_plain(layer: nn.Module) -> bool:
    """Whether the layer computes exactly x W^T + bias: a torch.nn.Linear that nothing
    wraps or hooks."""
    # Adapters, quantization and parametrizations replace the class of the layer or of
    # its weight.
    if type(layer) is not nn.Linear or type(layer.weight) not in (nn.Parameter, Tensor):
        return False
    if nn.Linear.forward is not LINEAR or any(getattr(module, name, None) for name in GLOBAL_HOOKS):
        return False
    # Pruning, offloading and sharding hook the layer, or put their own function over
    # its forward.
    return not (layer._forward_pre_hooks or layer._forward_hooks or "forward" in vars(layer))
