"""Fast memorized key attention: the memories are fused first, then attended to once.

    L1: x_t -------------------------------------+
    L2: m_t, the session average ----------------+-- f_t = sum_l lambda_l M_l -- Wk, Wv --> k, v --+
    L3: r_t = sum_j softmax_j(u_t . s_j) S_j ----+                                                 |
        over the K best completed chunks j                                                         |
    x -- Wq --> q -------- one causal attention, windowed if w is set -----------------------------+
                                                                        y = its output, times Wo

S_j is the mean of x over chunk j, s_j = S_j Ws its index key, u_t = x_t Wu the index query. lambda
is the key token's own, so k and v are final when written and can be cached.

Source: the original README of "MKA - An Efficient Memorized Key Attention Design"; arXiv 2603.20586
(FastMKA). B rows, T tokens, C hidden size, H query heads, G key/value heads, D head size (C / H
unless given), c chunk size, K chunks retrieved, M = 3 levels.
"""

import torch
from torch import Tensor, nn

from mka.attention.base import Bias
from mka.attention.grouped import MemoryAttention
from mka.errors import check_whole
from mka.memory.entry import Entry
from mka.memory.local import token_index
from mka.memory.longterm import (
    asked_at,
    chunk_entries,
    chunk_means,
    read_summaries,
    write_chunk_means,
)
from mka.memory.options import CHUNK_SIZE, LOCAL_WINDOW, SESSION_DECAY, TOP_K, SessionDecay
from mka.memory.router import LOCAL, LONG_TERM, SESSION
from mka.memory.search import retrieve
from mka.memory.state import State
from mka.ops.rotary import RotaryEmbedding

INDEX = "index_key"
"""The state's store of index keys s_j, which chunks are found by."""


class FastMemoryKeyedAttention(MemoryAttention):
    """One attention over keys and values made from the routed mix of three memories: x
    (B, T, C) -> y (B, T, C).

    Args:
        hidden_size: C, channels of x.
        num_heads: H, query heads.
        num_kv_heads: G, key/value heads; it must divide H. Default: None, H.
        local_window: w, the latest tokens that a token attends to, itself included.
            None: the whole past, and every completed chunk is a candidate. Default:
            128.
        chunk_size: c, tokens per long-term chunk. Default: 16.
        top_k: K, chunks retrieved per token; 0 switches the long-term level off. With 1
            the index projections are not trained, since a softmax over one chunk has no
            gradient. Default: 4.
        session_decay: a, in (0, 1), the weight of the past in the session average;
            "learned": one per channel; None switches the session level off. Default:
            "learned".
        index_size: width of the index keys and queries, which chunks are found by.
            Default: 64.
        sink_tokens: first tokens of a row that every later token attends to, in
            addition to its window. Default: None, 4 or as many as fit; none without a
            window.
        max_distance: the largest distance, in tokens, between a query and a sink under
            rotary positions: sinks further away are read as if they were this far.
            Default: None, no limit.
        router_size: width of the router's hidden layer. Default: None, C / 2.
        head_dim: D, channels per head. Default: None, C / H, so that H must divide C.
        bias: which projections have a bias: True (all), False (none), or "qkv" (all but
            the output projection). The index projections have none, the router always
            has. Default: False.
        rotary: the rotary embedding of queries and keys, of size D. Default: None,
            none.

    Raises ValueError for heads that do not divide, for sizes below 1, for a top_k below
    0, for a session_decay out of range, for sinks that do not fit the window, for a
    max_distance below local_window + sink_tokens, and for a rotary embedding of another
    size.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        local_window: int | None = LOCAL_WINDOW,
        chunk_size: int = CHUNK_SIZE,
        top_k: int = TOP_K,
        session_decay: SessionDecay = SESSION_DECAY,
        index_size: int = 64,
        sink_tokens: int | None = None,
        max_distance: int | None = None,
        router_size: int | None = None,
        head_dim: int | None = None,
        bias: Bias = False,
        rotary: RotaryEmbedding | None = None,
    ) -> None:
        shared = (
            chunk_size,
            top_k,
            session_decay,
            router_size,
            head_dim,
            bias,
            rotary,
            sink_tokens,
            max_distance,
        )
        super().__init__(hidden_size, num_heads, num_kv_heads, local_window, *shared)
        check_whole("index_size", index_size, 1)
        self.index_size = index_size
        # Without the long-term level they would be parameters that never get a
        # gradient.
        if top_k:
            self.index_q_proj = nn.Linear(hidden_size, index_size, bias=False)
            self.index_k_proj = nn.Linear(hidden_size, index_size, bias=False)

    def mix(self, x: Tensor, positions: Tensor | None, state: State | None) -> Tensor:
        """Query, route, fuse the memories, attend, project back; see
        `CausalAttention.mix`."""
        # The weights are those of the key token, so that k and v are final once they
        # are written.
        q, t = self.queries(x), token_index(x, state)
        f = self.fuse(x, self.weights_at(q, t, 0, state), state)
        read = self.read_local(q, self.keys(f), self.values(f), positions, state)
        return self.o_proj(read.values.flatten(2))

    def fuse(self, x: Tensor, weights: Tensor, state: State | None) -> Tensor:
        """f_t = sum_l lambda_l M_l, (B, T, C), given x and the router's weights (B, T,
        M)."""
        f = weights[..., LOCAL, None] * x
        if self.session is not None:
            f = f + weights[..., SESSION, None] * self.session(x, state)
        if self.top_k and (r := self.read_long_term(x, state)) is not None:
            f = f + weights[..., LONG_TERM, None] * r
        # Weights and averages are float32 or better; the projections need the dtype of
        # x.
        return f.to(x.dtype)

    def read_long_term(self, x: Tensor, state: State | None) -> Tensor | None:
        """r (B, T, C) for x (B, T, C), zeros where a token has no candidate; None if
        none has."""
        if state is not None:
            return self.read_state(x, state)
        means = chunk_means(x, self.chunk_size)
        if not self.num_candidates(x.shape[1]):
            return None
        # Index queries and keys as of one head: chunks are chosen per token, not per
        # head.
        keys, u = self.index_k_proj(means.to(x.dtype)), self.index_q_proj(x)
        retrieved = self.watched(retrieve(u.unsqueeze(2), keys.unsqueeze(2), self.limits()))
        return read_summaries(u, keys, means, retrieved)

    def read_state(self, x: Tensor, state: State) -> Tensor | None:
        """`read_long_term` with a state, to which the chunks that x completes are added
        first."""
        keys = self.index_k_proj(write_chunk_means(x, self.chunk_size, state).to(x.dtype))
        state.write(INDEX, keys)
        # Chunks are written whether or not any can be read yet: later calls will need
        # them.
        if not self.can_retrieve(state):
            return None
        u = self.index_q_proj(x)
        # Means kept on the host or on disk are fetched chunk by chunk, after they are
        # chosen.
        means = (
            state.records("chunk_mean") if state.is_apart("chunk_mean") else state.all("chunk_mean")
        )
        keys = state.all(INDEX)
        limits, asked = self.limits(state), asked_at(x, state)
        retrieved = self.watched(retrieve(u.unsqueeze(2), keys.unsqueeze(2), limits, asked))
        return read_summaries(u, keys, means, retrieved)

    @property
    def num_parameters(self) -> int:
        """Parameters, computed from the configuration."""
        return super().num_parameters + 2 * self.hidden_size * self.index_size * bool(self.top_k)

    def state_entries(self, dtype: torch.dtype) -> dict[str, Entry]:
        """The stores of a state: k and v in the window, m, the sum over the open chunk,
        and S_j and s_j of the completed chunks."""
        entries = super().state_entries(dtype)
        if self.session is not None:
            entries |= self.session.entries(self.hidden_size, dtype)
        if self.top_k:
            entries |= chunk_entries((self.hidden_size,), dtype, self.chunk_size, block=1)
            entries[INDEX] = Entry((self.index_size,), dtype, every=self.chunk_size)
        return entries

    def flops_per_token(self, context: int) -> int:
        """FLOPs of the forward pass of one token, the last of `context` (see
        `CausalAttention`)."""
        flops, candidates = super().flops_per_token(context), self.num_candidates(context)
        # An index query for every token, and an index key for each token that completes
        # a chunk.
        if self.top_k:
            flops += 2 * self.hidden_size * self.index_size * (1 + (context % self.chunk_size == 0))
        return (
            flops
            + 2 * self.index_size * candidates
            + 2 * self.hidden_size * min(self.top_k, candidates)
        )
