"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

    x -- Wdkv --> norm --> z (R) --+-- Wuk --> keys, H heads of D ----+
    |                              +-- Wuv --> values, H heads of D   |   k = [z Wuk ; k_rope], v = z Wuv
    +-- Wkr ---- rotary ------------> k_rope (1 head, shared) --------+
    x -- Wq (or Wdq, norm, Wuq) ----> q = [q_nope ; q_rope]               scale 1 / sqrt(D + D_rope)

A cache needs z and k_rope only: R + D_rope numbers a token, whatever H is. B rows, T tokens, C hidden size, H heads,
D = C / H, R latent rank.
"""

import torch
from torch import Tensor, cat, einsum, nn
from torch.nn.modules import module

from mka.attention.base import Bias, CausalAttention, normalise
from mka.limits import InputError, check_whole
from mka.memory.entry import Entry
from mka.memory.local import attend_local, local_entries
from mka.memory.state import State
from mka.ops.rotary import RotaryEmbedding

LINEAR = nn.Linear.forward
GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks")
"""Where torch keeps the hooks of all modules."""
LATENT = ("latent", "latent")
"""The state's store, as keys and as values."""


class MultiHeadLatentAttention(CausalAttention):
    """Keys and values are expanded from one latent vector a token.

    `kv_lora_rank` defaults to four head sizes, the ratio of the paper. `qk_rope_head_dim` adds rotary channels and
    needs a `rotary` of that size; 0 for backbones with other positions. `q_lora_rank` makes the queries low-rank too.
    Raises ValueError for ranks below 1 or a rotary embedding that does not fit.
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
        super().__init__(hidden_size, num_heads, num_heads, local_window, head_dim, bias, rotary, sink_tokens)
        check_whole("kv_lora_rank", kv_lora_rank, 1)
        check_whole("q_lora_rank", q_lora_rank, 1)
        if qk_rope_head_dim != (rotary.head_dim if rotary else 0):
            raise InputError(
                f"qk_rope_head_dim is {qk_rope_head_dim}; it must be the head_dim of rotary, "
                f"which is {rotary.head_dim if rotary else 'not given'}"
            )
        self.kv_lora_rank = kv_lora_rank or 4 * self.head_dim
        self.q_lora_rank = q_lora_rank
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
        q = self.queries(x, positions)
        z, k_rope = self.latent(x, positions)
        if state is None or state.is_fresh:
            if state is not None:
                state.write("latent", joined(z, k_rope))
            o = attend_local(q, *self.expanded(joined(z, k_rope)), self.window).values
        elif is_plain(self.k_up_proj) and is_plain(self.v_up_proj):
            o = self.absorbed(q, z, k_rope, state)
        else:
            latent = joined(z, k_rope)
            o = attend_local(q, latent, latent, self.window, state, LATENT, expand=self.expanded).values
        return self.o_proj(o.flatten(2))

    def expanded(self, latent: Tensor) -> tuple[Tensor, Tensor]:
        """k (B, S, H, D + D_rope) and v (B, S, H, D) of latents (B, S, 1, R + D_rope)."""
        z, k_rope = latent[:, :, 0, : self.kv_lora_rank], latent[..., self.kv_lora_rank :]
        k, v = (layer(z).unflatten(-1, (self.num_heads, -1)) for layer in (self.k_up_proj, self.v_up_proj))
        if self.rotary is not None:
            k = cat([k, k_rope.expand(-1, -1, self.num_heads, -1)], dim=-1)
        return k, v

    def absorbed(self, q: Tensor, z: Tensor, k_rope: Tensor | None, state: State) -> Tensor:
        """o (B, T, H, D) from latents alone: Wuk folded into the query, Wuv into the output.

        The latents are keys and values of one head; a bias of Wuk adds the same to all scores of a query. It reads the
        weights of Wuk and Wuv, so both must be plain layers.
        """
        w_uk, w_uv = (layer.weight.unflatten(0, (self.num_heads, -1)) for layer in (self.k_up_proj, self.v_up_proj))
        q = cat([einsum("bthd,hdr->bthr", q[..., : self.head_dim], w_uk), q[..., self.head_dim :]], dim=-1)
        latent, scale = joined(z, k_rope), (self.head_dim + self.qk_rope_head_dim) ** -0.5
        read = attend_local(q, latent, latent, self.window, state, LATENT, scale).values
        o = einsum("bthr,hdr->bthd", read[..., : self.kv_lora_rank], w_uv)
        return o if self.v_up_proj.bias is None else o + self.v_up_proj.bias.unflatten(0, (self.num_heads, -1))

    def queries(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """q (B, T, H, D + D_rope), its last D_rope channels rotated."""
        low = x if self.q_lora_rank is None else normalise(self.q_norm, self.q_down_proj(x))
        q = self.q_proj(low).unflatten(-1, (self.num_heads, -1))
        if self.rotary is None:
            return q
        return cat([q[..., : self.head_dim], self.rotate(q[..., self.head_dim :], positions)], dim=-1)

    def latent(self, x: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What a cache holds: z (B, T, R) and the shared rotary key (B, T, 1, D_rope)."""
        z = normalise(self.kv_norm, self.kv_down_proj(x))
        if self.rotary is None:
            return z, None
        return z, self.rotate(self.k_rope_proj(x).unsqueeze(2), positions)

    @property
    def num_parameters(self) -> int:
        c, r, rope, q_rank = self.hidden_size, self.kv_lora_rank, self.qk_rope_head_dim, self.q_lora_rank
        shapes = [(q_rank or c, self.q_size), (c, r), (r, self.inner_size), (r, self.inner_size)]
        shapes += [(c, q_rank)] if q_rank else []
        shapes += [(c, rope)] if rope else []
        return self.linear_parameters(*shapes) + r + (q_rank or 0)

    def state_entries(self, dtype: torch.dtype) -> dict[str, Entry]:
        """z and the shared rotary key of the tokens in the window and of the sinks, side by side."""
        return local_entries(LATENT, (1, self.kv_lora_rank + self.qk_rope_head_dim), dtype, self.window)

    def flops_per_token(self, context: int) -> int:
        c, r, rope, q_rank = self.hidden_size, self.kv_lora_rank, self.qk_rope_head_dim, self.q_lora_rank
        queries = 2 * (c * q_rank + q_rank * self.q_size if q_rank else c * self.q_size)
        inner = self.inner_size
        latent = 2 * c * (r + rope) + 4 * r * inner
        return queries + latent + 2 * inner * c + 2 * (self.q_size + inner) * self.keys_attended(context)


def joined(z: Tensor, k_rope: Tensor | None) -> Tensor:
    """z (B, T, R) and k_rope (B, T, 1, D_rope) as the one key (B, T, 1, R + D_rope) that a cache holds."""
    z = z.unsqueeze(2)
    return z if k_rope is None else cat([z, k_rope.to(z.dtype)], dim=-1)


def is_plain(layer: nn.Module) -> bool:
    """Whether calling the layer does no more than its weight says: it is torch's own, nothing wraps it or hooks it.

    Adapters and quantization put another class in its place, or in that of its weight, parametrizations too; pruning,
    offloading and sharding hook it, or put a function of their own over its forward.
    """
    if type(layer) is not nn.Linear or type(layer.weight) not in (nn.Parameter, Tensor):
        return False
    if nn.Linear.forward is not LINEAR or any(getattr(module, name, None) for name in GLOBAL_HOOKS):
        return False
    return not (layer._forward_pre_hooks or layer._forward_hooks or "forward" in vars(layer))
