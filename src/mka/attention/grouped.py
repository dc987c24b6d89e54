"""What the mechanisms with grouped key/value heads share, and what the two with memories add to it."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from mka.attention.base import Bias, CausalAttention, normalise
from mka.config import InputError, SessionDecay, check_at_least, check_memory
from mka.memory.entry import Entry
from mka.memory.local import local_entries
from mka.memory.longterm import num_candidates
from mka.memory.places import LongTerm
from mka.memory.router import LOCAL, LONG_TERM, NUM_LEVELS, SESSION, Router
from mka.memory.search import CODE, Limits, code_entry, sign_codes
from mka.memory.session import SessionAverage
from mka.memory.state import State
from mka.ops.rotary import RotaryEmbedding


class GroupedAttention(CausalAttention):
    """H query heads of D over G key/value heads of D: Wq (C, HD), Wk and Wv (C, GD), Wo (HD, C).

    `normalise_heads` puts an RMSNorm over D behind Wq and Wk (QK-norm, as Qwen3 has it); without it there is none.
    """

    q_norm: nn.RMSNorm | None
    k_norm: nn.RMSNorm | None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        local_window: int | None,
        head_dim: int | None,
        bias: Bias,
        rotary: RotaryEmbedding | None,
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, local_window, head_dim, bias, rotary)
        if rotary is not None and rotary.head_dim != self.head_dim:
            raise InputError(f"rotary.head_dim is {rotary.head_dim}; it must be the head size, {self.head_dim}")
        self.kv_size = num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, self.inner_size, bias=bool(bias))
        self.k_proj = nn.Linear(hidden_size, self.kv_size, bias=bool(bias))
        self.v_proj = nn.Linear(hidden_size, self.kv_size, bias=bool(bias))
        self.register_module("q_norm", None)
        self.register_module("k_norm", None)
        self.o_proj = self.output_projection()

    def normalise_heads(self, eps: float) -> None:
        """Normalise queries and keys, head by head, before any rotary embedding."""
        self.q_norm, self.k_norm = (nn.RMSNorm(self.head_dim, eps=eps) for _ in range(2))

    def heads(self, x: Tensor) -> Tensor:
        """(..., heads D) -> (..., heads, D)."""
        return x.unflatten(-1, (-1, self.head_dim))

    def queries(self, x: Tensor) -> Tensor:
        """x (..., C) -> q (..., H, D), not yet rotated."""
        q = self.heads(self.q_proj(x))
        return q if self.q_norm is None else normalise(self.q_norm, q).to(q.dtype)

    def keys(self, x: Tensor) -> Tensor:
        """x (..., C) -> k (..., G, D), not yet rotated."""
        k = self.heads(self.k_proj(x))
        return k if self.k_norm is None else normalise(self.k_norm, k).to(k.dtype)

    def values(self, x: Tensor) -> Tensor:
        """x (..., C) -> v (..., G, D)."""
        return self.heads(self.v_proj(x))

    @property
    def num_parameters(self) -> int:
        c, kv = self.hidden_size, self.kv_size
        norms = 0 if self.q_norm is None else 2 * self.head_dim
        return self.linear_parameters((c, self.inner_size), (c, kv), (c, kv)) + norms

    def state_entries(self, dtype: torch.dtype) -> dict[str, Entry]:
        """k and v of the tokens in the window."""
        return local_entries(("k", "v"), (self.num_kv_heads, self.head_dim), dtype, self.local_window)

    def flops_per_token(self, context: int) -> int:
        projections = 4 * self.hidden_size * (self.inner_size + self.kv_size)
        return projections + 4 * self.inner_size * self.keys_attended(context)


class MemoryAttention(GroupedAttention):
    """Grouped heads with a session average, long-term chunks and a router over the three levels.

    `session_decay=None` switches the session level off, `top_k=0` the long-term level. `index_store` names the state's
    store of the keys that chunks are found by.
    """

    index_store: str

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None,
        local_window: int | None,
        chunk_size: int,
        top_k: int,
        session_decay: SessionDecay,
        router_size: int | None,
        head_dim: int | None,
        bias: Bias,
        rotary: RotaryEmbedding | None,
    ) -> None:
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        super().__init__(hidden_size, num_heads, num_kv_heads, local_window, head_dim, bias, rotary)
        check_memory(local_window, chunk_size, top_k, session_decay)
        check_at_least("router_size", router_size, 1)
        self.chunk_size = chunk_size
        self.top_k = top_k
        self.router_size = router_size or max(1, hidden_size // 2)
        self.session = None if session_decay is None else SessionAverage(hidden_size, session_decay)
        self.router = Router(self.inner_size, self.router_size)

    def levels_at(self, t: Tensor, first_session: int, state: State | None = None) -> Tensor:
        """(B or 1, T, M) bool: the levels that exist at token indices t; the session has something to offer from
        `first_session`, the long-term level with its first candidate, which a bank may hold."""
        exists = torch.zeros(*t.shape, NUM_LEVELS, dtype=torch.bool, device=t.device)
        exists[..., LOCAL] = True
        exists[..., SESSION] = (t >= first_session) & (self.session is not None)
        if self.top_k:
            banked = 0 if state is None else state.banked
            exists[..., LONG_TERM] = num_candidates(t, self.chunk_size, self.local_window or 0) + banked > 0
        return exists

    def initial_state(
        self,
        batch_size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        reversible: int = 0,
        longterm: LongTerm | None = None,
    ) -> State:
        bank = None if longterm is None else longterm.bank
        if longterm and bank and longterm.config.longterm_search == "lsh":
            keys = bank.summaries[self.index_store]
            keys = keys if keys.dim() == 3 else keys.unsqueeze(1)
            coded = {CODE: sign_codes(keys, keys)}
            longterm = replace(longterm, bank=replace(bank, summaries={**bank.summaries, **coded}))
        return super().initial_state(batch_size, dtype, device, reversible, longterm)

    def state_of(self, dtype: torch.dtype, longterm: LongTerm | None) -> dict[str, Entry]:
        """`state_entries`, with the sign codes of the summaries where they are searched by them."""
        entries = self.state_entries(dtype)
        if longterm is None or longterm.config.longterm_search != "lsh" or not self.top_k:
            return entries
        shape = entries[self.index_store].shape
        groups, width = shape if len(shape) == 2 else (1, *shape)
        return entries | {CODE: code_entry(groups, width, self.chunk_size)}

    def write_index(self, keys: Tensor, state: State) -> None:
        """Note the keys (B, N, G, E) or (B, N, E) of the chunks that this call completes, as they will be searched."""
        if CODE in state.entries:
            keys, held = (x if x.dim() == 4 else x.unsqueeze(2) for x in (keys, state.all(self.index_store)))
            state.write(CODE, sign_codes(keys, held))

    @property
    def limits(self) -> Limits:
        """Which chunks are candidates, and how many of them are retrieved."""
        return Limits(self.chunk_size, self.local_window or 0, self.top_k)

    def can_retrieve(self, state: State) -> bool:
        """Whether any token has a candidate by now."""
        return self.num_candidates(max(state.lengths)) + state.banked > 0

    def num_candidates(self, context: int) -> int:
        """Chunks that the last of `context` tokens may retrieve."""
        return max(0, (context - (self.local_window or 0)) // self.chunk_size) if self.top_k else 0

    @property
    def num_parameters(self) -> int:
        router = self.router_size
        learned_decay = self.session is not None and self.session.fixed_decay is None
        return (
            super().num_parameters
            + (self.inner_size + 1) * router
            + (router + 1) * NUM_LEVELS
            + learned_decay * self.hidden_size
        )

    def flops_per_token(self, context: int) -> int:
        return super().flops_per_token(context) + 2 * self.router_size * (self.inner_size + NUM_LEVELS)
