"""Memory-keyed attention: three memories, read by one softmax.

                 +-- L1: k, v of the tokens in the window, and of the sinks ---- s_1, a_1 --+
    x -- Wq --> q+-- L2: k, v of the session average m ------------------------- s_2, a_2 --+-- mix -- Wo --> y
         |       +-- L3: k, v of the K chunks retrieved for q ------------------ s_3, a_3 --+
         +-- router: r_t = MLP(q_t), a logit for each level (and head)

    s_l = logsumexp(q k_l^T / sqrt(D)), a_l = softmax(q k_l^T / sqrt(D)) v_l, for each head; causal inside each level
    joint     o_t = sum_l exp(s_l + b_l) a_l / sum_l exp(s_l + b_l)    b_l = r_l - r_1: one softmax over all of them
    routed    o_t = sum_l lambda_l a_l                                 lambda = softmax(r): given before anyone looked

Keys and values of all levels use the same Wk, Wv. With b = 0, no L2 and every chunk retrieved, joint is full attention.

Source: the original README of "MKA - An Efficient Memorized Key Attention Design" and arXiv 2603.20586 (routed); the
merge by log-sum-exps as in MoBA (arXiv 2502.13189); sinks: StreamingLLM (arXiv 2309.17453).
B rows, T tokens, C hidden size, H query heads, G key/value heads, D = C / H, c chunk size,
K chunks retrieved, J = T // c, M = 3 levels.
"""

from functools import partial

import torch
from torch import Tensor

from mka.attention.base import Bias
from mka.attention.grouped import MemoryAttention, Watched, silenced
from mka.limits import (
    LONGTERM_POSITIONS,
    MIXES,
    InputError,
    LongTermPositions,
    Mix,
    SessionDecay,
    check_whole,
    unknown_name,
)
from mka.memory.entry import Entry
from mka.memory.held import Chunks, Meeting, attend_held, rerank
from mka.memory.local import local_entries, token_index
from mka.memory.longterm import asked_at, chunk_entries, chunk_means, last_of_chunks, write_chunk_means
from mka.memory.router import LOCAL, LONG_TERM, SESSION
from mka.memory.search import AsRead, Retrieved, near_at, retrieve, retrieve_as_read
from mka.memory.session import attend_slots, slot_columns
from mka.memory.state import State
from mka.ops.attend import Read, both, mixed, shares_of, sum_of
from mka.ops.rotary import RotaryEmbedding

TOKENS, LOCAL_TOKENS, SLOTS = ("k", "v"), ("local_k", "local_v"), ("slot_k", "slot_v")
"""Names of a state's stores, keys and values."""
MEAN, FAR_MEAN, PLACE = "chunk_mean", "far_mean", "chunk_place"
"""Of chunks: the mean key as it stands, as it would stand in a chunk at 0, and the position of the first token."""

PROPOSED = 4
"""Chunks that mean keys propose, for each that all keys choose."""


class MemoryKeyedAttention(MemoryAttention):
    """Local window w with sinks, session slots at every `session_stride`-th token, and the K best chunks before them.

    A token reads the latest `session_slots` slots (None: all of them). `session_decay=None` switches the session level
    off, `top_k=0` or `local_window=None` the long-term level (with no window nothing lies outside it). Chunks are
    retrieved per token and key/value head. `sink_tokens` None: 4, or as many as fit.

    `mix`: "joint", one softmax over all that is read, found by keys as they are read; the window then reaches back to
    the beginning of a chunk, so that no token is between window and chunks. "routed", the paper's: a softmax for each
    level, weighed by the router; chunks found by unrotated keys, the group's queries summed.

    With rotary embeddings retrieved keys stand at their own distance, bounded by `max_distance` as that of the sinks is
    ("true"), at the window's edge ("clamped"), or nowhere ("none": neither they nor the query are rotated).
    Raises ValueError for heads that do not divide and limits of the memory levels.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        mix: Mix = "joint",
        local_window: int | None = 128,
        sink_tokens: int | None = None,
        chunk_size: int = 16,
        top_k: int = 4,
        longterm_positions: LongTermPositions = "true",
        max_distance: int | None = None,
        session_decay: SessionDecay = "learned",
        session_stride: int = 16,
        session_slots: int | None = 256,
        router_size: int | None = None,
        head_dim: int | None = None,
        bias: Bias = False,
        rotary: RotaryEmbedding | None = None,
    ) -> None:
        if mix not in MIXES:
            raise unknown_name("mix", mix, MIXES)
        if longterm_positions not in LONGTERM_POSITIONS:
            raise unknown_name("longterm_positions", longterm_positions, LONGTERM_POSITIONS)
        if local_window is None:
            top_k = min(top_k, 0)  # nothing lies outside the window; a negative number still meets its check
        shared = (chunk_size, top_k, session_decay, router_size, head_dim, bias, rotary, sink_tokens, max_distance)
        super().__init__(hidden_size, num_heads, num_kv_heads, local_window, *shared, mix_by_head=mix == "joint")
        check_whole("session_stride", session_stride, 1)
        check_whole("session_slots", session_slots, 1)
        self.is_joint = mix == "joint"
        least = (local_window or 0) + chunk_size + self.sink_tokens
        if max_distance is not None and max_distance < least:
            raise InputError(
                f"max_distance is {max_distance}; it must be at least local_window, chunk_size and sink_tokens "
                f"together, {least}"
            )
        self.session_stride = session_stride
        self.session_slots = session_slots
        self.longterm_positions = longterm_positions

    @property
    def window_begins(self) -> int:
        return self.chunk_size if self.is_joint and self.top_k else 1

    @property
    def hidden_sinks(self) -> int:
        return self.sink_tokens

    @property
    def stands_apart(self) -> bool:
        """Whether retrieved keys have distances of their own."""
        return self.rotary is not None and self.longterm_positions == "true"

    @property
    def slots_read(self) -> int | None:
        """The latest slots that a token reads: none of them further away than `max_distance`."""
        if self.rotary is None or self.max_distance is None:
            return self.session_slots
        reachable = max(1, self.max_distance // self.session_stride)
        return reachable if self.session_slots is None else min(self.session_slots, reachable)

    def mix(self, x: Tensor, positions: Tensor | None, state: State | None) -> Tensor:
        """Query, three reads, one softmax, output: x (B, T, C), positions (T,) or (B, T) -> y (B, T, C)."""
        q, k, v = self.queries(x), self.keys(x), self.values(x)
        t, rotated = token_index(x, state), (self.rotate(q, positions), self.rotate(k, positions))
        far = partial(self.far_queries, q, positions, t)
        local = self.attend_local(*rotated, v, state, self.local_stores, far=far, lse=self.is_joint)
        biases = self.router.biases(q) if self.is_joint else None
        reads = [(LOCAL, local)]
        if self.session is not None:
            m = self.session(x, state).to(x.dtype)
            reads.append((SESSION, self.read_session(rotated[0], m, positions, state)))
        if self.top_k:
            raw = (q, k)
            window = None if biases is None else local.sums - biases[..., LONG_TERM]
            reads += [(LONG_TERM, read) for read in self.read_long_term(raw, rotated, v, window, positions, state)]
        o = self.routed(q, reads, t, state) if biases is None else self.joint(reads, biases)
        return self.o_proj(o.flatten(2))

    def joint(self, reads: list[tuple[int, Read]], biases: Tensor) -> Tensor:
        """o (B, T, H, D): one softmax over all reads, given the level of each, and biases (B, T, H, M)."""
        factor = self.router.session_factor()
        if self.silent is not None:
            reads = silenced(reads, self.silent)
        weights = shares_of(
            [read for _, read in reads],
            [None if level == LOCAL else biases[..., level] for level, _ in reads],
            [factor if level == SESSION else None for level, _ in reads],
        )
        if self.watcher is not None:
            self.watcher(Watched.of([level for level, _ in reads], weights, [read for _, read in reads]))
        return mixed(weights, [read for _, read in reads])

    def routed(self, q: Tensor, reads: list[tuple[int, Read]], t: Tensor, state: State | None) -> Tensor:
        """o (B, T, H, D): the reads weighed; two of one level are one softmax."""
        weights = self.weights_at(q, t, self.session_stride - 1, state).to(q.dtype)
        levels = {level: [read for each, read in reads if each == level] for level, _ in reads}
        parts = {level: (both(*found) if len(found) > 1 else found[0]).values for level, found in levels.items()}
        return sum_of([weights[..., level, None, None] * values for level, values in parts.items()])

    def read_session(self, q: Tensor, m: Tensor, positions: Tensor | None, state: State | None) -> Read:
        """a_2 (B, T, H, D) of rotated queries q. Slot i is the average at token (i + 1) stride - 1, visible from there
        on; before, nothing."""
        stride, first = self.session_stride, self.session_stride - 1
        if state is None:
            k, v = self.slots(m[:, first::stride], None if positions is None else positions[..., first::stride])
        else:
            columns = slot_columns(stride, m.shape[1], state)
            rows = torch.arange(m.shape[0], device=m.device)[:, None]
            places = None if positions is None else positions.expand(m.shape[:2])[rows, columns]
            k, v = self.slots(m[rows, columns], places)
        return attend_slots(q, k, v, stride, self.slots_read, state, SLOTS, lse=self.is_joint)

    def slots(self, m: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """k and v (B, N, G, D) of averages m (B, N, C)."""
        return self.rotate(self.keys(m), positions), self.values(m)

    def read_long_term(
        self,
        raw: tuple[Tensor, Tensor],
        rotated: tuple[Tensor, Tensor],
        v: Tensor,
        window: Tensor | None,
        positions: Tensor | None,
        state: State | None,
    ) -> list[Read]:
        """a_3 (B, T, H, D) of queries (B, T, H, D) and keys (B, T, G, D), as projected and as rotated.

        window (B, T, H), with the joint mix: the log-sum-exp of what a head reads there, less the bias of this level.
        Nothing where no token has a candidate; two reads where some chunks are read at their distance, others at
        `max_distance`.
        """
        q, k = rotated if self.stands_apart else (self.at_edge(raw[0]), raw[1])
        chunks = self.chunks(k, v, k if self.is_joint else raw[1], positions, state)
        if chunks is None:
            return []
        near, places = None, chunks.places
        if places is not None and positions is not None:
            near = near_at(positions, places, self.max_distance, chunks.banked)
        q_far = q if near is None else self.rotate(raw[0], self.farthest(q))
        asked, limits = asked_at(v, state), self.limits(state)

        def meetings(retrieved: Retrieved) -> list[Meeting]:
            if near is None or places is None:
                return [Meeting(q, retrieved)]
            close_by, beyond = retrieved.split(near)
            back = -places.expand(len(v), -1)

            def turn(k: Tensor, row: Tensor, chunk: Tensor) -> Tensor:
                return self.turned(k.unsqueeze(2), back[row, chunk].unsqueeze(1)).squeeze(2)

            return [Meeting(q, close_by), Meeting(q_far, beyond, turn)]

        if window is None:
            retrieved = retrieve(self.index_queries(raw[0]), chunks.means, limits, asked)
        else:
            far = None if near is None or chunks.far_means is None else AsRead(q_far, chunks.far_means)
            wider = limits._replace(top_k=self.proposed(chunks.means.shape[1]))
            by_keys = wider.top_k > self.top_k
            retrieved = retrieve_as_read(AsRead(q, chunks.means), far, near, wider, asked, by_place=by_keys)
            if by_keys:
                retrieved = rerank(meetings(retrieved), chunks, retrieved, window, limits)
        self.watched(retrieved)
        found = meetings(retrieved)
        lse = self.is_joint or len(found) > 1
        return [attend_held(meeting, chunks, self.chunk_size, self.hidden_sinks, lse=lse) for meeting in found]

    def chunks(
        self, k: Tensor, v: Tensor, found_by: Tensor, positions: Tensor | None, state: State | None
    ) -> Chunks | None:
        """The chunks that tokens can retrieve, those that k and v (B, T, G, D) complete included; None: no token can.

        found_by (B, T, G, D): the keys of which chunks are found by the mean.
        """
        if state is None:
            if not self.num_candidates(v.shape[1]):
                return None
            means = chunk_means(found_by, self.chunk_size, self.sink_tokens).to(k.dtype)
            places = self.places(v, positions, None)
            far_means = None if places is None else self.turned(means, -places)
            return Chunks(k, v, means, far_means, places)
        self.write_chunks(k, v, found_by, positions, state)
        if not self.can_retrieve(state):
            return None
        keys, values = (state.records(x) if state.is_apart(x) else state.all(x) for x in TOKENS)
        if not self.stands_apart:
            return Chunks(keys, values, state.all(MEAN), banked=state.banked)
        places = state.all(PLACE).squeeze(2)
        return Chunks(keys, values, state.all(MEAN), state.all(FAR_MEAN), places, state.banked)

    def write_chunks(self, k: Tensor, v: Tensor, found_by: Tensor, positions: Tensor | None, state: State) -> None:
        """Add what this call brings to the state: tokens, and what is known of the chunks that they complete."""
        for name, x in zip(TOKENS, (k, v), strict=True):
            state.write(name, x)
        fresh = write_chunk_means(found_by, self.chunk_size, state, self.sink_tokens)
        places = self.places(v, positions, state) if fresh.shape[1] else None
        if places is not None:
            state.write(PLACE, places.expand(len(v), -1).unsqueeze(2))
            state.write(FAR_MEAN, self.turned(fresh.to(k.dtype), -places))

    def places(self, x: Tensor, positions: Tensor | None, state: State | None) -> Tensor | None:
        """(B or 1, N): where the chunks that x (B, T, ...) completes begin; None: they have no positions."""
        if not self.stands_apart or positions is None:
            return None
        positions = positions.expand(x.shape[:2]) if positions.dim() == 2 else positions[None]
        if state is None:
            last = positions[:, self.chunk_size - 1 :: self.chunk_size]
        else:
            columns = last_of_chunks(x, self.chunk_size, state)
            last = positions.expand(x.shape[:2]).gather(1, columns.expand(len(x), -1))
        return last - (self.chunk_size - 1)

    def turned(self, x: Tensor, by: Tensor) -> Tensor:
        """x (B, N, G, D), rotated already, as it would be `by` (B or 1, N) positions on."""
        return x if self.rotary is None else self.rotary.turn(x, by)

    def farthest(self, x: Tensor) -> Tensor:
        """(1,): the distance at which chunks begin that are further away than any may be."""
        return torch.tensor([self.max_distance or (self.local_window or 0) + self.chunk_size - 1], device=x.device)

    def proposed(self, candidates: int) -> int:
        """How many of so many chunks the means propose; where it is no more than `top_k`, all of them are read."""
        return max(self.top_k, min(PROPOSED * self.top_k, candidates)) if self.is_joint else self.top_k

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
        """Where a state keeps the window: where all tokens are kept for the long-term level, apart from them."""
        return LOCAL_TOKENS if self.top_k else TOKENS

    def state_entries(self, dtype: torch.dtype) -> dict[str, Entry]:
        """k and v of the window and sinks (of all tokens with L3), the session slots, m, what chunks are found by."""
        heads = (self.num_kv_heads, self.head_dim)
        entries = local_entries(self.local_stores, heads, dtype, self.window)
        if self.session is not None:
            entries |= self.session.entries(self.hidden_size, dtype)
            slot = Entry(heads, dtype, every=self.session_stride, latest=self.slots_read)
            entries |= dict.fromkeys(SLOTS, slot)
        if self.top_k:
            entries |= dict.fromkeys(TOKENS, Entry(heads, dtype, block=self.chunk_size))
            entries |= chunk_entries(heads, dtype, self.chunk_size)
            entries[MEAN] = Entry(heads, dtype, every=self.chunk_size)
            if self.stands_apart:
                entries[FAR_MEAN] = entries[MEAN]
                entries[PLACE] = Entry((1,), torch.int64, every=self.chunk_size)
        return entries

    def flops_per_token(self, context: int) -> int:
        c, kv, candidates = self.hidden_size, self.kv_size, self.num_candidates(context)
        inner = self.inner_size
        flops = super().flops_per_token(context)
        if self.session is not None:
            slots, fresh = divmod(context, self.session_stride)
            slots = slots if self.slots_read is None else min(slots, self.slots_read)
            flops += 4 * inner * slots + 4 * c * kv * (fresh == 0)
        scored = inner if self.is_joint else kv
        chosen, proposed = min(self.top_k, candidates), self.proposed(candidates)
        by_keys = proposed if proposed > self.top_k else 0
        return flops + 2 * scored * candidates + 2 * inner * self.chunk_size * (by_keys + 2 * chosen)
