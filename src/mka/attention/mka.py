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

from mka.attention.base import Bias
from mka.attention.grouped import MemoryAttention
from mka.config import LONGTERM_POSITIONS, LongTermPositions, SessionDecay, check_at_least, unknown_name
from mka.memory.entry import Entry
from mka.memory.local import attend_local, local_entries, token_index
from mka.memory.longterm import (
    attend_chunks,
    attend_records,
    chunk_entries,
    chunk_means,
    retrieve,
    write_chunk_means,
)
from mka.memory.router import LOCAL, LONG_TERM, SESSION
from mka.memory.search import search
from mka.memory.session import attend_slots, slot_columns
from mka.memory.state import State
from mka.ops.rotary import RotaryEmbedding

TOKENS, LOCAL_TOKENS, SLOTS = ("k", "v"), ("local_k", "local_v"), ("slot_k", "slot_v")
"""Names of a state's stores, keys and values."""


class MemoryKeyedAttention(MemoryAttention):
    """Local window w, session slots at every `session_stride`-th token, and the K best chunks outside the window.

    A token reads the latest `session_slots` slots (None: all of them). `session_decay=None` switches the session level
    off, `top_k=0` or `local_window=None` the long-term level (with no window nothing lies outside it). Retrieval is per
    token and key/value head: the group's queries, summed, against the mean key of each chunk. With rotary embeddings
    retrieved keys stand at one distance: the window's edge ("clamped"), or 0 ("none": neither they nor the query are
    rotated).
    Raises ValueError for heads that do not divide and limits of the memory levels.
    """

    index_store = "chunk_mean"

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
        session_slots: int | None = 256,
        longterm_positions: LongTermPositions = "clamped",
        router_size: int | None = None,
        head_dim: int | None = None,
        bias: Bias = False,
        rotary: RotaryEmbedding | None = None,
    ) -> None:
        if local_window is None:
            top_k = min(top_k, 0)  # nothing lies outside the window; a negative number still meets its check
        shared = (chunk_size, top_k, session_decay, router_size, head_dim, bias, rotary)
        super().__init__(hidden_size, num_heads, num_kv_heads, local_window, *shared)
        check_at_least("session_stride", session_stride, 1)
        check_at_least("session_slots", session_slots, 1)
        self.session_stride = session_stride
        self.session_slots = session_slots
        if longterm_positions not in LONGTERM_POSITIONS:
            raise unknown_name("longterm_positions", longterm_positions, LONGTERM_POSITIONS)
        self.longterm_positions = longterm_positions

    def mix(self, x: Tensor, positions: Tensor | None, state: State | None) -> Tensor:
        """Query, route, three reads, output: x (B, T, C), positions (T,) or (B, T) -> y (B, T, C)."""
        q, k, v = self.queries(x), self.keys(x), self.values(x)
        levels = self.levels_at(token_index(x, state), self.session_stride - 1, state)
        weights = self.router(q, levels).to(q.dtype)
        o = weights[..., LOCAL, None, None] * self.read_local(q, k, v, positions, state)
        if self.session is not None:
            read = self.read_session(q, self.session(x, state).to(x.dtype), positions, state)
            o = o + weights[..., SESSION, None, None] * read
        if self.top_k:
            read = self.read_long_term(q, k, v) if state is None else self.read_chunks(q, k, v, state)
            o = o + weights[..., LONG_TERM, None, None] * read
        return self.o_proj(o.flatten(2))

    def read_local(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None, state: State | None) -> Tensor:
        """a_1 (B, T, H, D)."""
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        return attend_local(q, k, v, self.local_window, state, self.local_stores)

    def read_session(self, q: Tensor, m: Tensor, positions: Tensor | None, state: State | None) -> Tensor:
        """a_2 (B, T, H, D). Slot i is the average at token (i + 1) stride - 1, visible from there on; before, zeros."""
        stride, first = self.session_stride, self.session_stride - 1
        if state is None:
            k, v = self.slots(m[:, first::stride], None if positions is None else positions[..., first::stride])
        else:
            columns = slot_columns(stride, m.shape[1], state)
            rows = torch.arange(m.shape[0], device=m.device)[:, None]
            places = None if positions is None else positions.expand(m.shape[:2])[rows, columns]
            k, v = self.slots(m[rows, columns], places)
        return attend_slots(self.rotate(q, positions), k, v, stride, self.session_slots, state, SLOTS)

    def slots(self, m: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """k and v (B, N, G, D) of averages m (B, N, C)."""
        return self.rotate(self.keys(m), positions), self.values(m)

    def read_long_term(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """a_3 (B, T, H, D); zeros before the first token that has a candidate.

        Every retrieved key stands at the same distance.
        """
        if not self.num_candidates(q.shape[1]):
            return torch.zeros_like(q)
        retrieved = retrieve(self.index_queries(q), chunk_means(k, self.chunk_size), **self.limits._asdict())
        return attend_chunks(self.at_edge(q), k, v, retrieved, self.chunk_size)

    def read_chunks(self, q: Tensor, k: Tensor, v: Tensor, state: State) -> Tensor:
        """a_3 with the chunks of the state."""
        if self.local_stores != TOKENS:
            for name, x in zip(TOKENS, (k, v), strict=True):
                state.write(name, x)
        self.write_index(write_chunk_means(k, self.chunk_size, state), state)
        if not self.can_retrieve(state):
            return torch.zeros_like(q)
        retrieved = search(self.index_queries(q), state, self.index_store, token_index(q, state), self.limits)
        if state.is_apart(TOKENS[0]):
            keys, values = (state.records(name) for name in TOKENS)
            return attend_records(self.at_edge(q), keys, values, retrieved, self.chunk_size)
        k, v = (state.all(name) for name in TOKENS)
        return attend_chunks(self.at_edge(q), k, v, retrieved, self.chunk_size)

    def index_queries(self, q: Tensor) -> Tensor:
        """(B, T, G, D): the queries of each group, summed, before any rotary embedding."""
        return q.unflatten(2, (self.num_kv_heads, -1)).sum(3)

    def at_edge(self, q: Tensor) -> Tensor:
        """Queries as they meet unrotated keys: rotated to the window's edge, or not at all."""
        if self.longterm_positions == "none":
            return q
        return self.rotate(q, torch.tensor([self.local_window or 0], device=q.device))

    @property
    def local_stores(self) -> tuple[str, str]:
        """Where a state keeps the window: with the long-term tokens, unless those are needed without their rotation."""
        return LOCAL_TOKENS if self.top_k and self.rotary is not None else TOKENS

    def state_entries(self, dtype: torch.dtype) -> dict[str, Entry]:
        """k and v of the tokens (of all of them with L3), the session slots, m, chunk summaries and the open one."""
        heads = (self.num_kv_heads, self.head_dim)
        entries = local_entries(self.local_stores, heads, dtype, self.local_window)
        if self.session is not None:
            entries |= self.session.entries(self.hidden_size, dtype)
            slot = Entry(heads, dtype, every=self.session_stride, latest=self.session_slots)
            entries |= dict.fromkeys(SLOTS, slot)
        if self.top_k:
            entries |= dict.fromkeys(TOKENS, Entry(heads, dtype, block=self.chunk_size))
            entries |= chunk_entries(heads, dtype, self.chunk_size)
        return entries

    def flops_per_token(self, context: int) -> int:
        c, kv, candidates = self.hidden_size, self.kv_size, self.num_candidates(context)
        inner = self.inner_size
        flops = super().flops_per_token(context)
        if self.session is not None:
            slots, fresh = divmod(context, self.session_stride)
            slots = slots if self.session_slots is None else min(slots, self.session_slots)
            flops += 4 * inner * slots + 4 * c * kv * (fresh == 0)
        return flops + 2 * kv * candidates + 4 * inner * self.chunk_size * min(self.top_k, candidates)
