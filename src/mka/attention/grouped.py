"""What the mechanisms with grouped key/value heads share, and what the two with memories add to it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mka.attention.base import Bias, CausalAttention, normalise
from mka.limits import InputError, SessionDecay, check_memory, check_whole
from mka.memory.entry import Entry
from mka.memory.local import attend_local, local_entries, shown_here, token_index
from mka.memory.router import LOCAL, LONG_TERM, NUM_LEVELS, SESSION, Router
from mka.memory.search import Limits, Retrieved
from mka.memory.session import SessionAverage
from mka.memory.state import State
from mka.ops.attend import Read, with_empty
from mka.ops.rotary import RotaryEmbedding


class GroupedAttention(CausalAttention):
    """H query heads of D over G key/value heads of D: Wq (C, HD), Wk and Wv (C, GD), Wo (HD, C).

    `normalise_heads` puts a norm over D behind Wq and Wk (QK-norm, as Qwen3 and Gemma-3 have it); without it there is
    none. `query_factor` multiplies the queries of a family whose scale is not 1 / sqrt(D). `learn_sink_logits` adds to
    the softmax of the window one more term for each head, which has no value (gpt-oss).
    """

    q_norm: nn.Module | None
    k_norm: nn.Module | None
    sink_logits: nn.Parameter | None
    query_factor: float = 1.0

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        local_window: int | None,
        head_dim: int | None,
        bias: Bias,
        rotary: RotaryEmbedding | None,
        sink_tokens: int | None,
        max_distance: int | None,
    ) -> None:
        shared = (head_dim, bias, rotary, sink_tokens, max_distance)
        super().__init__(hidden_size, num_heads, num_kv_heads, local_window, *shared)
        if rotary is not None and rotary.head_dim != self.head_dim:
            raise InputError(f"rotary.head_dim is {rotary.head_dim}; it must be the head size, {self.head_dim}")
        self.kv_size = num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, self.inner_size, bias=bool(bias))
        self.k_proj = nn.Linear(hidden_size, self.kv_size, bias=bool(bias))
        self.v_proj = nn.Linear(hidden_size, self.kv_size, bias=bool(bias))
        self.register_module("q_norm", None)
        self.register_module("k_norm", None)
        self.register_parameter("sink_logits", None)
        self.o_proj = self.output_projection()

    def normalise_heads(self, norm: Callable[[int], nn.Module]) -> None:
        """Normalise queries and keys, head by head, before any rotary embedding, each by what `norm` makes of D."""
        self.q_norm, self.k_norm = (norm(self.head_dim) for _ in range(2))

    def learn_sink_logits(self) -> None:
        """Let a head attend to nothing at all: (H,), zeros."""
        self.sink_logits = nn.Parameter(torch.zeros(self.num_heads))

    def heads(self, x: Tensor) -> Tensor:
        """(..., heads D) -> (..., heads, D)."""
        return x.unflatten(-1, (-1, self.head_dim))

    def queries(self, x: Tensor) -> Tensor:
        """x (..., C) -> q (..., H, D), not yet rotated."""
        q = self.heads(self.q_proj(x))
        q = q if self.q_norm is None else normalise(self.q_norm, q).to(q.dtype)
        return q if self.query_factor == 1 else q * self.query_factor

    def keys(self, x: Tensor) -> Tensor:
        """x (..., C) -> k (..., G, D), not yet rotated."""
        k = self.heads(self.k_proj(x))
        return k if self.k_norm is None else normalise(self.k_norm, k).to(k.dtype)

    def values(self, x: Tensor) -> Tensor:
        """x (..., C) -> v (..., G, D)."""
        return self.heads(self.v_proj(x))

    def read_local(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor | None,
        state: State | None,
        names: tuple[str, str] = ("k", "v"),
        *,
        lse: bool = False,
    ) -> Read:
        """What q (B, T, H, D) reads of the tokens k and v (B, T, G, D), none rotated yet, and of those before."""
        far = partial(self.far_queries, q, positions, token_index(q, state))
        return self.attend_local(
            self.rotate(q, positions), self.rotate(k, positions), v, state, names, far=far, lse=lse
        )

    def attend_local(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: State | None,
        names: tuple[str, str],
        *,
        far: Callable[[], Tensor],
        lse: bool,
    ) -> Read:
        """The same of what is rotated."""
        logits = self.sink_logits
        if logits is not None and shown_here() is not None:
            raise InputError("output_attentions is True; of heads with sink logits such weights are not shown")
        read = attend_local(q, k, v, self.window, state, names, far=far, lse=lse or logits is not None)
        return read if logits is None else with_empty(read, logits)

    @property
    def num_parameters(self) -> int:
        c, kv = self.hidden_size, self.kv_size
        norms = 0 if self.q_norm is None else 2 * self.head_dim
        sinks = 0 if self.sink_logits is None else self.num_heads
        return self.linear_parameters((c, self.inner_size), (c, kv), (c, kv)) + norms + sinks

    def state_entries(self, dtype: torch.dtype) -> dict[str, Entry]:
        """k and v of the tokens in the window, and of the sinks."""
        return local_entries(("k", "v"), (self.num_kv_heads, self.head_dim), dtype, self.window)

    def flops_per_token(self, context: int) -> int:
        projections = 4 * self.hidden_size * (self.inner_size + self.kv_size)
        return projections + 4 * self.inner_size * self.keys_attended(context)


class Watched(NamedTuple):
    """What a mechanism does with its levels: the weight of each (B, T, H or 1, M), and which exist (B, T, M)."""

    weights: Tensor
    exists: Tensor

    @classmethod
    def of(cls, levels: Sequence[int], weights: Tensor, reads: Sequence[Read]) -> "Watched":
        """Of reads with one weight each, (N, B, T, H), and the level of each."""
        mass = weights.new_zeros(*weights.shape[1:], NUM_LEVELS)
        exists = torch.zeros(*weights.shape[1:3], NUM_LEVELS, dtype=torch.bool, device=weights.device)
        for level, weight, read in zip(levels, weights, reads, strict=True):
            mass[..., level] += weight
            exists[..., level] |= (read.sums > -torch.inf).any(-1)
        return cls(mass, exists)


def silenced(reads: Sequence[tuple[int, Read]], silent: int) -> list[tuple[int, Read]]:
    """The reads with nothing where the level `silent` was; a query that reads there alone keeps it."""
    others = [read.sums > -torch.inf for level, read in reads if level != silent]
    if not others:
        return list(reads)
    some = torch.stack(others).any(0)
    return [
        (level, read._replace(lse=read.sums.masked_fill(some, -torch.inf))) if level == silent else (level, read)
        for level, read in reads
    ]


class MemoryAttention(GroupedAttention):
    """Grouped heads with a session average, long-term chunks and a router over the three levels.

    `session_decay=None` switches the session level off, `top_k=0` the long-term level. `mix_by_head`: whether the
    router has logits for every head. For those who look: `watcher` is called with what is `Watched` and with what is
    `Retrieved` in every call, and the level `silent` is left out wherever there is another.
    """

    watcher: Callable[[Watched | Retrieved], None] | None = None
    silent: int | None = None

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
        sink_tokens: int | None,
        max_distance: int | None,
        *,
        mix_by_head: bool = False,
    ) -> None:
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        shared = (head_dim, bias, rotary, sink_tokens, max_distance)
        super().__init__(hidden_size, num_heads, num_kv_heads, local_window, *shared)
        check_memory(local_window, chunk_size, top_k, session_decay)
        check_whole("router_size", router_size, 1)
        self.chunk_size = chunk_size
        self.top_k = top_k
        self.router_size = router_size or max(1, hidden_size // 2)
        self.session = None if session_decay is None else SessionAverage(hidden_size, session_decay)
        self.router = Router(self.inner_size, self.router_size, num_heads if mix_by_head else None)

    def levels_at(self, t: Tensor, first_session: int, state: State | None = None) -> Tensor:
        """(B or 1, T, M) bool: the levels that exist at token indices t; the session has something to offer from
        `first_session`, the long-term level with its first candidate, which a bank may hold."""
        exists = torch.zeros(*t.shape, NUM_LEVELS, dtype=torch.bool, device=t.device)
        exists[..., LOCAL] = True
        exists[..., SESSION] = (t >= first_session) & (self.session is not None)
        if self.top_k:
            limits = self.limits(state)
            exists[..., LONG_TERM] = (limits.end(t) > limits.banked + limits.hidden) | (limits.banked > 0)
        return exists

    def weights_at(self, q: Tensor, t: Tensor, first_session: int, state: State | None) -> Tensor:
        """(B, T, M): the router's weights of the levels that exist at t, for queries (B, T, H, D)."""
        exists = self.levels_at(t, first_session, state)
        if self.silent is not None:
            exists[..., self.silent] = False
            exists[..., LOCAL] |= ~exists.any(-1)
        weights = self.router.weights(q, exists)
        if self.watcher is not None:
            self.watcher(Watched(weights.unsqueeze(2), exists.expand(weights.shape)))
        return weights

    def watched(self, retrieved: Retrieved) -> Retrieved:
        if self.watcher is not None:
            self.watcher(retrieved)
        return retrieved

    @property
    def hidden_sinks(self) -> int:
        """Tokens at the beginning of a row that L1 holds for ever, and that are not read again in their chunks."""
        return 0

    def limits(self, state: State | None = None) -> Limits:
        """Which chunks are candidates, and how many of them are retrieved."""
        banked = 0 if state is None else state.banked
        return Limits(self.chunk_size, self.local_window or 0, self.top_k, self.hidden_sinks, banked)

    def can_retrieve(self, state: State) -> bool:
        """Whether any token has a candidate by now."""
        return self.limits(state).count(max(state.lengths)) > 0

    def num_candidates(self, context: int) -> int:
        """Chunks that the last of `context` tokens may retrieve."""
        return self.limits().count(context)

    @property
    def num_parameters(self) -> int:
        router, logits = self.router_size, self.router.output.out_features
        learned_decay = self.session is not None and self.session.fixed_decay is None
        return (
            super().num_parameters
            + (self.inner_size + 1) * router
            + (router + 1) * logits
            + learned_decay * self.hidden_size
        )

    def flops_per_token(self, context: int) -> int:
        return super().flops_per_token(context) + 2 * self.router_size * (
            self.inner_size + self.router.output.out_features
        )
