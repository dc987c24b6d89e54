"""Memory-keyed attention: three attentions over three memories, mixed by a learned router.

                 +-- L1: k, v of the tokens in the window -------- a_1 --+
    x -- Wq --> q+-- L2: k, v of the session average m ----------- a_2 --+-- sum_l lambda_l a_l -- Wo --> y
         |       +-- L3: k, v of the K chunks retrieved for q ---- a_3 --+
         +-- router: lambda_t = softmax(MLP(q_t)) over the levels that exist at t

    a_l = softmax(q k_l^T / sqrt(D)) v_l, causal inside each level; keys and values of all levels use the same Wk, Wv.

Source: the original README of "MKA - An Efficient Memorized Key Attention Design"; arXiv 2603.20586.
B rows, T tokens, C hidden size, H query heads, G key/value heads, D = C / H, c chunk size,
K chunks retrieved, J = T // c, M = 3 levels.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from mka.attention.grouped import MemoryAttention
from mka.config import SessionDecay, check_at_least
from mka.memory.longterm import Retrieved, chunk_mask, chunk_means, retrieve
from mka.memory.router import LOCAL, LONG_TERM, SESSION
from mka.ops.attend import attend_causal, attend_masked
from mka.ops.rotary import RotaryEmbedding


class MemoryKeyedAttention(MemoryAttention):
    """Local window w, session slots at every `session_stride`-th token, and the K best chunks outside the window.

    `session_decay=None` switches the session level off, `top_k=0` or `local_window=None` the long-term level (with no
    window nothing lies outside it). Retrieval is per token and key/value head: the group's queries, summed, against
    the mean key of each chunk. Retrieved keys are placed at the window's edge by rotary embeddings.
    Raises ValueError for heads that do not divide and limits of the memory levels.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        local_window: int | None = 128,
        chunk_size: int = 16,
        top_k: int = 4,
        session_decay: SessionDecay = "learned",
        session_stride: int = 16,
        router_size: int | None = None,
        bias: bool = False,
        rotary: RotaryEmbedding | None = None,
    ) -> None:
        if local_window is None:
            top_k = min(top_k, 0)  # nothing lies outside the window; a negative number still meets its check
        shared = (chunk_size, top_k, session_decay, router_size, bias, rotary)
        super().__init__(hidden_size, num_heads, num_kv_heads, local_window, *shared)
        check_at_least("session_stride", session_stride, 1)
        self.session_stride = session_stride

    def mix(self, x: Tensor, positions: Tensor) -> Tensor:
        """Query, route, three reads, output: x (B, T, C), positions (T,) or (B, T) -> y (B, T, C)."""
        q, k, v = self.heads(self.q_proj, x), self.heads(self.k_proj, x), self.heads(self.v_proj, x)
        weights = self.router(q, self.levels_at(x.shape[1], self.session_stride - 1, x.device)).to(q.dtype)
        o = weights[..., LOCAL, None, None] * self.read_local(q, k, v, positions)
        if self.session is not None and x.shape[1] >= self.session_stride:
            o = o + weights[..., SESSION, None, None] * self.read_session(q, self.session(x), positions)
        if self.num_candidates(x.shape[1]):
            o = o + weights[..., LONG_TERM, None, None] * self.read_long_term(q, k, v)
        return self.o_proj(o.flatten(2))

    def read_local(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        """a_1 (B, T, H, D)."""
        return attend_causal(self.rotate(q, positions), self.rotate(k, positions), v, self.local_window)

    def read_session(self, q: Tensor, m: Tensor, positions: Tensor) -> Tensor:
        """a_2 (B, T, H, D). Slot i is the average at token (i + 1) stride - 1, visible from there on; before, zeros."""
        first, stride = self.session_stride - 1, self.session_stride
        slots = m[:, first::stride].to(self.k_proj.weight.dtype)
        k, v = self.heads(self.k_proj, slots), self.heads(self.v_proj, slots)
        q, k = self.rotate(q, positions)[:, first:], self.rotate(k, positions[..., first::stride])
        if stride == 1:
            return attend_causal(q, k, v)
        t = torch.arange(q.shape[1], device=m.device)
        return pad(attend_masked(q, k, v, t[::stride] <= t[:, None]), (0, 0, 0, 0, first, 0))

    def read_long_term(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """a_3 (B, T, H, D); zeros before the first token that has a candidate.

        Every retrieved key stands at the same distance, the window's edge.
        """
        window, tokens = self.local_window or 0, q.shape[1]
        first, reach = window + self.chunk_size - 1, self.num_candidates(tokens) * self.chunk_size
        retrieved = self.retrieve(q, k)
        mask = chunk_mask(Retrieved(*(x[:, first:] for x in retrieved)), reach // self.chunk_size, self.chunk_size)
        edge = torch.tensor([window], device=q.device)
        read = attend_masked(self.rotate(q[:, first:], edge), k[:, :reach], v[:, :reach], mask)
        return pad(read, (0, 0, 0, 0, first, 0))

    def retrieve(self, q: Tensor, k: Tensor) -> Retrieved:
        """The chunks each query retrieves; q (B, T, H, D), k (B, T, G, D), both before any rotary embedding."""
        queries = q.unflatten(2, (self.num_kv_heads, -1)).sum(3)
        limits = {"chunk_size": self.chunk_size, "window": self.local_window or 0, "top_k": self.top_k}
        return retrieve(queries, chunk_means(k, self.chunk_size), **limits)

    def state_numbers(self, num_tokens: int) -> int:
        """k and v of the tokens (of all of them with L3), the session slots, m and its count, chunk summaries."""
        kept = num_tokens if self.top_k else self.keys_attended(num_tokens)
        numbers = 2 * self.kv_size * kept
        if self.session is not None:
            numbers += 2 * self.kv_size * (num_tokens // self.session_stride) + self.hidden_size + 1
        if self.top_k:
            numbers += self.kv_size * (num_tokens // self.chunk_size + 1)
        return numbers

    def flops_per_token(self, context: int) -> int:
        c, kv, candidates = self.hidden_size, self.kv_size, self.num_candidates(context)
        flops = super().flops_per_token(context)
        if self.session is not None:
            slots, fresh = divmod(context, self.session_stride)
            flops += 4 * c * slots + 4 * c * kv * (fresh == 0)
        return flops + 2 * kv * candidates + 4 * c * self.chunk_size * min(self.top_k, candidates)
