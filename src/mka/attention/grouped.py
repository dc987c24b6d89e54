"""What all mechanisms with grouped key/value heads share (arXiv 2305.13245), and what
the two with memories (arXiv 2603.20586) add to it."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mka.attention.base import Bias, CausalAttention, normalize
from mka.errors import InputError, check_whole
from mka.memory.entry import Entry
from mka.memory.local import attend_local, local_entries, shown_here, token_index
from mka.memory.options import SessionDecay, check_memory
from mka.memory.router import LOCAL, LONG_TERM, NUM_LEVELS, SESSION, Router
from mka.memory.search import Limits, Retrieved
from mka.memory.session import SessionAverage
from mka.memory.state import State
from mka.ops.attend import Read, with_empty
from mka.ops.rotary import RotaryEmbedding


class GroupedAttention(CausalAttention):
    """H query heads of D over G key/value heads of D: Wq (C, HD), Wk and Wv (C, GD), Wo
    (HD, C).

    The arguments are those of `CausalAttention`. Raises ValueError also for a rotary
    embedding of a size other than D.
    """

    q_norm: nn.Module | None
    """A norm over D of each query head; None: none"""
    k_norm: nn.Module | None
    """The same for key heads"""
    sink_logits: nn.Parameter | None
    """(H,): a term of each head's softmax over the window that has no value; None:
    none"""
    query_factor: float = 1.0
    """Factor of the queries, for a family whose scale is not 1 / sqrt(D)"""

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
            raise InputError(
                f"rotary.head_dim is {rotary.head_dim}; it must be the head size, {self.head_dim}"
            )
        self.kv_size = num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(hidden_size, self.inner_size, bias=bool(bias))
        self.k_proj = nn.Linear(hidden_size, self.kv_size, bias=bool(bias))
        self.v_proj = nn.Linear(hidden_size, self.kv_size, bias=bool(bias))
        # Registered although None: which of them exist depends on the family, not on
        # the mechanism.
        self.register_module("q_norm", None)
        self.register_module("k_norm", None)
        self.register_parameter("sink_logits", None)
        self.o_proj = self.output_projection()

    def normalize_heads(self, norm: Callable[[int], nn.Module]) -> None:
        """Normalize each query and key head before any rotary embedding (QK-norm, as in
        Qwen3 and Gemma 3).

        norm: makes a norm over the last dimension, given its size D; called once for
            queries and once for keys.
        """
        self.q_norm = norm(self.head_dim)
        self.k_norm = norm(self.head_dim)

    def learn_sink_logits(self) -> None:
        """Add the parameter `sink_logits` (H,), zeros, which lets a head attend to
        nothing, as in gpt-oss."""
        self.sink_logits = nn.Parameter(torch.zeros(self.num_heads))

    def heads(self, x: Tensor) -> Tensor:
        """Split channels into heads: (..., heads * D) -> (..., heads, D)."""
        return x.unflatten(-1, (-1, self.head_dim))

    def queries(self, x: Tensor) -> Tensor:
        """Queries of x (..., C), not yet rotated: (..., H, D)."""
        q = self.heads(self.q_proj(x))
        # Under autocast a norm may return float32; the kernels need q, k and v of one
        # dtype.
        q = q if self.q_norm is None else normalize(self.q_norm, q).to(q.dtype)
        return q if self.query_factor == 1 else q * self.query_factor

    def keys(self, x: Tensor) -> Tensor:
        """Keys of x (..., C), not yet rotated: (..., G, D)."""
        k = self.heads(self.k_proj(x))
        return k if self.k_norm is None else normalize(self.k_norm, k).to(k.dtype)

    def values(self, x: Tensor) -> Tensor:
        """Values of x (..., C): (..., G, D)."""
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
        """Attention within the window, tokens of the state included.

        Args:
            q: (B, T, H, D), not yet rotated.
            k, v: (B, T, G, D), not yet rotated.
            positions: (T,) or (B or 1, T); None without rotary embeddings.
            state: to read from and to write k and v to. None: this call is the whole
                row.
            names: the state's stores of k and v. Default: "k", "v".
            lse: also return the log-sum-exps. Default: False.

        Returns a read of (B, T, H, D).
        """
        # A function, because most calls are not that far from the sinks and never need
        # it.
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
        """`read_local` for q and k that are rotated; `far` makes the queries for
        distant sinks.

        Raises ValueError if weights are asked for (`output_attentions`) and heads have
        sink logits.
        """
        logits = self.sink_logits
        if logits is not None and shown_here() is not None:
            raise InputError(
                "output_attentions is True; weights of heads with sink logits are not shown"
            )
        # The kernels have no place for a term without a value: it is added by its
        # log-sum-exp.
        read = attend_local(
            q, k, v, self.window, state, names, far=far, lse=lse or logits is not None
        )
        return read if logits is None else with_empty(read, logits)

    @property
    def num_parameters(self) -> int:
        """Parameters, computed from the configuration."""
        c, kv = self.hidden_size, self.kv_size
        norms = 0 if self.q_norm is None else 2 * self.head_dim
        sinks = 0 if self.sink_logits is None else self.num_heads
        return self.linear_parameters((c, self.inner_size), (c, kv), (c, kv)) + norms + sinks

    def state_entries(self, dtype: torch.dtype) -> dict[str, Entry]:
        """The stores of a state: k and v of the tokens in the window and of the
        sinks."""
        return local_entries(("k", "v"), (self.num_kv_heads, self.head_dim), dtype, self.window)

    def flops_per_token(self, context: int) -> int:
        """FLOPs of the forward pass of one token, the last of `context` (see
        `CausalAttention`)."""
        # Two matrices of inner_size (q, o) and two of kv_size (k, v), 2 FLOPs per
        # multiply-add.
        projections = 4 * self.hidden_size * (self.inner_size + self.kv_size)
        return projections + 4 * self.inner_size * self.keys_attended(context)


class Watched(NamedTuple):
    """How much a mechanism reads of each of its M = 3 levels."""

    weights: Tensor
    """(B, T, H, M), or (B, T, 1, M) if all heads have the same: the share of each
    level"""
    exists: Tensor
    """(B, T, M): False where a level has nothing to offer"""

    @classmethod
    def of(cls, levels: Sequence[int], weights: Tensor, reads: Sequence[Read]) -> "Watched":
        """The sum over N reads, given the level of each and its weights (N, B, T,
        H)."""
        # A level can have several reads: chunks nearby and chunks beyond max_distance.
        mass = weights.new_zeros(*weights.shape[1:], NUM_LEVELS)
        exists = torch.zeros(
            *weights.shape[1:3], NUM_LEVELS, dtype=torch.bool, device=weights.device
        )
        for level, weight, read in zip(levels, weights, reads, strict=True):
            mass[..., level] += weight
            exists[..., level] |= (read.sums > -torch.inf).any(-1)
        return cls(mass, exists)


def silenced(reads: Sequence[tuple[int, Read]], silent: int) -> list[tuple[int, Read]]:
    """The reads (level, read) without the level `silent`, except for queries that read
    nowhere else."""
    others = [read.sums > -torch.inf for level, read in reads if level != silent]
    if not others:
        return list(reads)
    some = torch.stack(others).any(0)
    kept = []
    for level, read in reads:
        # A log-sum-exp of -inf gives the read a weight of 0 in the joint softmax.
        if level == silent:
            read = read._replace(lse=read.sums.masked_fill(some, -torch.inf))
        kept.append((level, read))
    return kept


class MemoryAttention(GroupedAttention):
    """Grouped heads with a session average, long-term chunks and a router over the
    three levels.

    Args (the others are those of `CausalAttention`):
        num_kv_heads: G, key/value heads; it must divide H. None: H.
        local_window: w, in tokens. None: the whole past.
        chunk_size: c, tokens per long-term chunk.
        top_k: K, chunks retrieved per token and key/value head; 0 switches the level
            off.
        session_decay: a, in (0, 1), or "learned": one per channel. None switches the
            level off.
        router_size: width of the router's hidden layer. None: C / 2.
        mix_by_head: whether the router has logits for each head. Default: False, one
            set for all.

    Raises ValueError for an option of the memory levels that is out of range, and as
    `CausalAttention` does.
    """

    watcher: Callable[[Watched | Retrieved], None] | None = None
    """Called in every forward pass with the levels' weights, and with the chunks
    retrieved"""
    silent: int | None = None
    """A level that is left out wherever another one exists, to measure what it
    contributes"""

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
        # The router reads the queries of all heads: what a token looks for decides
        # where.
        self.router = Router(self.inner_size, self.router_size, num_heads if mix_by_head else None)

    def levels_at(self, t: Tensor, first_session: int, state: State | None = None) -> Tensor:
        """(B or 1, T, M) bool: the levels that have something to offer at token indices
        t (B or 1, T).

        first_session: the token index from which the session level exists. The
            long-term level exists from its first candidate on, or everywhere if the
            state has a bank.
        """
        exists = torch.zeros(*t.shape, NUM_LEVELS, dtype=torch.bool, device=t.device)
        exists[..., LOCAL] = True
        exists[..., SESSION] = (t >= first_session) & (self.session is not None)
        if self.top_k:
            limits = self.limits(state)
            # Chunks of sinks alone are no candidates: the window reads the sinks
            # anyway.
            own = limits.end(t) > limits.banked + limits.hidden
            exists[..., LONG_TERM] = own | (limits.banked > 0)
        return exists

    def weights_at(self, q: Tensor, t: Tensor, first_session: int, state: State | None) -> Tensor:
        """The router's weights (B, T, M), for queries q (B, T, H, D) before any rotary
        embedding; the other arguments are those of `levels_at`."""
        exists = self.levels_at(t, first_session, state)
        if self.silent is not None:
            exists[..., self.silent] = False
            # A softmax needs one level at least: the window is read where it would be
            # the only one.
            exists[..., LOCAL] |= ~exists.any(-1)
        weights = self.router.weights(q, exists)
        if self.watcher is not None:
            self.watcher(Watched(weights.unsqueeze(2), exists.expand(weights.shape)))
        return weights

    def watched(self, retrieved: Retrieved) -> Retrieved:
        """`retrieved` unchanged, after showing it to the watcher."""
        if self.watcher is not None:
            self.watcher(retrieved)
        return retrieved

    @property
    def hidden_sinks(self) -> int:
        """First tokens of a row that are not read in their chunk, because L1 always
        reads them."""
        return 0

    def limits(self, state: State | None = None) -> Limits:
        """Which chunks are candidates, and how many of them are retrieved."""
        banked = 0 if state is None else state.banked
        return Limits(
            self.chunk_size, self.local_window or 0, self.top_k, self.hidden_sinks, banked
        )

    def can_retrieve(self, state: State) -> bool:
        """Whether any token of the state's rows, this call's included, has a
        candidate."""
        return self.limits(state).count(max(state.lengths)) > 0

    def num_candidates(self, context: int) -> int:
        """How many chunks the last of `context` tokens may choose from, without a
        bank."""
        return self.limits().count(context)

    @property
    def num_parameters(self) -> int:
        """Parameters, computed from the configuration."""
        router, logits = self.router_size, self.router.output.out_features
        # The router has two layers with biases; a learned decay has one number per
        # channel.
        learned_decay = self.session is not None and self.session.fixed_decay is None
        return (
            super().num_parameters
            + (self.inner_size + 1) * router
            + (router + 1) * logits
            + learned_decay * self.hidden_size
        )

    def flops_per_token(self, context: int) -> int:
        """FLOPs of the forward pass of one token, the last of `context` (see
        `CausalAttention`)."""
        return super().flops_per_token(context) + 2 * self.router_size * (
            self.inner_size + self.router.output.out_features
        )
