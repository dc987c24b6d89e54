"""Fast memory-keyed attention: the memories are fused first, and attended to once.

    L1: x_t -------------------------------------------+
    L2: m_t, the session average ----------------------+-- f_t = sum_l lambda_l M_l -- Wk, Wv --> k, v --+
    L3: r_t = sum_j softmax_j(u_t . s_j) S_j ----------+                                                 |
        over the K best completed chunks j                                                               |
    x -- Wq --> q ---------------------------------------- one causal attention, windowed if w is set ---+-- Wo --> y

S_j is the mean of x over chunk j, s_j = S_j Ws its index key, u_t = x_t Wu the index query. lambda is the key token's
own, so k and v are final when written and can be cached.

Source: the original README of "MKA - An Efficient Memorized Key Attention Design"; arXiv 2603.20586 (FastMKA).
B rows, T tokens, C hidden size, H query heads, G key/value heads, D = C / H, c chunk size, K chunks retrieved,
M = 3 levels.
"""

import torch
from torch import Tensor, nn

from mka.attention.base import Bias
from mka.attention.grouped import MemoryAttention
from mka.limits import SessionDecay, check_whole
from mka.memory.entry import Entry
from mka.memory.local import token_index
from mka.memory.longterm import asked_at, chunk_entries, chunk_means, read_summaries, write_chunk_means
from mka.memory.router import LOCAL, LONG_TERM, SESSION
from mka.memory.search import retrieve
from mka.memory.state import State
from mka.ops.rotary import RotaryEmbedding

INDEX = "index_key"
"""The state's store of what chunks are found by."""


class FastMemoryKeyedAttention(MemoryAttention):
    """One attention over keys and values made from the routed mix of three memories.

    With `local_window=None` attention is over the whole past, and every completed chunk is a candidate of L3.
    A softmax over one chunk has no gradient: with `top_k=1` the index projections stay as they were initialised.
    `session_decay=None` switches the session level off, `top_k=0` the long-term level. `index_size` is the width of
    the index keys. Raises ValueError for heads that do not divide and limits of the memory levels.
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
        index_size: int = 64,
        sink_tokens: int | None = None,
        max_distance: int | None = None,
        router_size: int | None = None,
        head_dim: int | None = None,
        bias: Bias = False,
        rotary: RotaryEmbedding | None = None,
    ) -> None:
        shared = (chunk_size, top_k, session_decay, router_size, head_dim, bias, rotary, sink_tokens, max_distance)
        super().__init__(hidden_size, num_heads, num_kv_heads, local_window, *shared)
        check_whole("index_size", index_size, 1)
        self.index_size = index_size
        if top_k:
            self.index_q_proj = nn.Linear(hidden_size, index_size, bias=False)
            self.index_k_proj = nn.Linear(hidden_size, index_size, bias=False)

    def mix(self, x: Tensor, positions: Tensor | None, state: State | None) -> Tensor:
        """Query, memories, route, fuse, attend, output: x (B, T, C), positions (T,) or (B, T) -> y (B, T, C)."""
        q, t = self.queries(x), token_index(x, state)
        f = self.fuse(x, self.weights_at(q, t, 0, state), state)
        read = self.read_local(q, self.keys(f), self.values(f), positions, state)
        return self.o_proj(read.values.flatten(2))

    def fuse(self, x: Tensor, weights: Tensor, state: State | None) -> Tensor:
        """f (B, T, C): the mix, by the router's weights (B, T, M), of the levels at every token."""
        f = weights[..., LOCAL, None] * x
        if self.session is not None:
            f = f + weights[..., SESSION, None] * self.session(x, state)
        if self.top_k and (r := self.read_long_term(x, state)) is not None:
            f = f + weights[..., LONG_TERM, None] * r
        return f.to(x.dtype)

    def read_long_term(self, x: Tensor, state: State | None) -> Tensor | None:
        """r (B, T, C); None where no token has a candidate."""
        if state is not None:
            return self.read_state(x, state)
        means = chunk_means(x, self.chunk_size)
        if not self.num_candidates(x.shape[1]):
            return None
        keys, u = self.index_k_proj(means.to(x.dtype)), self.index_q_proj(x)
        retrieved = self.watched(retrieve(u.unsqueeze(2), keys.unsqueeze(2), self.limits()))
        return read_summaries(u, keys, means, retrieved)

    def read_state(self, x: Tensor, state: State) -> Tensor | None:
        """The same with the chunks of the state, to which those that x completes are added."""
        keys = self.index_k_proj(write_chunk_means(x, self.chunk_size, state).to(x.dtype))
        state.write(INDEX, keys)
        if not self.can_retrieve(state):
            return None
        u = self.index_q_proj(x)
        means = state.records("chunk_mean") if state.is_apart("chunk_mean") else state.all("chunk_mean")
        keys = state.all(INDEX)
        limits, asked = self.limits(state), asked_at(x, state)
        retrieved = self.watched(retrieve(u.unsqueeze(2), keys.unsqueeze(2), limits, asked))
        return read_summaries(u, keys, means, retrieved)

    @property
    def num_parameters(self) -> int:
        return super().num_parameters + 2 * self.hidden_size * self.index_size * bool(self.top_k)

    def state_entries(self, dtype: torch.dtype) -> dict[str, Entry]:
        """k and v in the window, m, the open chunk's sum, S_j and s_j of the completed chunks."""
        entries = super().state_entries(dtype)
        if self.session is not None:
            entries |= self.session.entries(self.hidden_size, dtype)
        if self.top_k:
            entries |= chunk_entries((self.hidden_size,), dtype, self.chunk_size, block=1)
            entries[INDEX] = Entry((self.index_size,), dtype, every=self.chunk_size)
        return entries

    def flops_per_token(self, context: int) -> int:
        flops, candidates = super().flops_per_token(context), self.num_candidates(context)
        if self.top_k:
            flops += 2 * self.hidden_size * self.index_size * (1 + (context % self.chunk_size == 0))
        return flops + 2 * self.index_size * candidates + 2 * self.hidden_size * min(self.top_k, candidates)
