"""Memorized key attention: three memories, read by one softmax.

                +-- L1: k, v of the window's tokens and sinks ------- s_1, a_1 --+
    x -- Wq --> q --- L2: k, v of the session average m ------------- s_2, a_2 --+-- mix -- Wo --> y
         |      +-- L3: k, v of the K chunks retrieved for q -------- s_3, a_3 --+
         +-- router: r_t = MLP(q_t), a logit for each level (and head)

    for each head, causal inside each level:
    s_l = logsumexp(q k_l^T / sqrt(D))    a_l = softmax(q k_l^T / sqrt(D)) v_l

    joint     o_t = sum_l exp(s_l + b_l) a_l / sum_l exp(s_l + b_l)    with b_l = r_l - r_1:
              one softmax over all levels
    routed    o_t = sum_l lambda_l a_l    with lambda = softmax(r):
              weights that do not depend on what is found

Keys and values of all levels use the same Wk, Wv. With b = 0, no L2 and every chunk retrieved,
joint is full attention.

Source: the original README of "MKA - An Efficient Memorized Key Attention Design" and arXiv
2603.20586 (routed); the merge by log-sum-exps as in MoBA (arXiv 2502.13189); sinks: StreamingLLM
(arXiv 2309.17453). B rows, T tokens, C hidden size, H query heads, G key/value heads, D head size
(C / H unless given), c chunk size, K chunks retrieved, J = T // c, M = 3 levels.
"""

from functools import partial

import torch
from torch import Tensor

from mka.attention.base import Bias
from mka.attention.grouped import MemoryAttention, Watched, silenced
from mka.errors import InputError, check_whole, unknown_name
from mka.memory.entry import Entry
from mka.memory.held import Chunks, Meeting, attend_held, rerank
from mka.memory.local import local_entries, token_index
from mka.memory.longterm import (
    asked_at,
    chunk_entries,
    chunk_means,
    last_of_chunks,
    write_chunk_means,
)
from mka.memory.options import (
    CHUNK_SIZE,
    LOCAL_WINDOW,
    LONGTERM_POSITIONS,
    MIX,
    MIXES,
    POSITIONS,
    SESSION_DECAY,
    SESSION_SLOTS,
    SESSION_STRIDE,
    TOP_K,
    LongTermPositions,
    Mix,
    SessionDecay,
)
from mka.memory.router import LOCAL, LONG_TERM, SESSION
from mka.memory.search import AsRead, Retrieved, near_at, retrieve, retrieve_as_read
from mka.memory.session import attend_slots, slot_columns
from mka.memory.state import State
from mka.ops.attend import Read, both, mixed, shares_of, sum_of
from mka.ops.rotary import RotaryEmbedding

TOKENS, LOCAL_TOKENS, SLOTS = ("k", "v"), ("local_k", "local_v"), ("slot_k", "slot_v")
"""Names of a state's stores of keys and values: of all tokens for L3 (without L3, of
the window), of the window beside them, and of session slots."""
MEAN, FAR_MEAN, PLACE = "chunk_mean", "far_mean", "chunk_place"
"""Stores with one entry per chunk: its mean key, the same as if the chunk began at
position 0, and the position of its first token."""

PROPOSED = 4
"""How many chunks the mean keys propose for each chunk that is read; all their keys
decide."""


class MemoryKeyedAttention(MemoryAttention):
    """A local window with sinks, session slots, and the best chunks before the window:
    x (B, T, C) -> y (B, T, C).

    Args:
        hidden_size: C, channels of x.
        num_heads: H, query heads.
        num_kv_heads: G, key/value heads; it must divide H. Default: None, H.
        mix: how the levels are read. "joint": one softmax over all of them; chunks are
            found by keys as they will be read, and the window is extended back to the
            beginning of a chunk, so that no token lies between window and chunks.
            "routed", as in the paper: one softmax per level, weighed by the router;
            chunks are found by unrotated keys and the sum of a group's queries.
            Default: "joint".
        local_window: w, the latest tokens that a token attends to, itself included.
            None: the whole past, which switches the long-term level off, since nothing
            lies outside the window. Default: 128.
        sink_tokens: first tokens of a row that every later token attends to, in
            addition to its window. Default: None, 4 or as many as fit; none without a
            window.
        chunk_size: c, tokens per long-term chunk. Default: 16.
        top_k: K, chunks retrieved per token and key/value head; 0 switches the
            long-term level off. Default: 4.
        longterm_positions: with rotary embeddings, the distance at which retrieved keys
            are read: "true", their own up to max_distance; "clamped", the window's edge
            for all of them; "none", neither they nor their queries are rotated.
            Default: "true".
        max_distance: the largest distance, in tokens, at which sinks and retrieved
            chunks are read under rotary positions; session slots further away are not
            read. It must be at least local_window + chunk_size + sink_tokens. Default:
            None, no limit.
        session_decay: a, in (0, 1), the weight of the past in the session average;
            "learned": one per channel; None switches the session level off. Default:
            "learned".
        session_stride: tokens per session slot; 1 keeps one for every token. Default:
            16.
        session_slots: how many of the latest slots a token reads. None: all. Default:
            256.
        router_size: width of the router's hidden layer. Default: None, C / 2.
        head_dim: D, channels per head. Default: None, C / H, so that H must divide C.
        bias: which projections have a bias: True (all), False (none), or "qkv" (all but
            the output projection). The router always has one. Default: False.
        rotary: the rotary embedding of queries and keys, of size D. Default: None,
            none.

    Raises ValueError for an unknown mix or longterm_positions, for heads that do not
    divide, for sizes below 1, for a top_k below 0, for a session_decay out of range,
    for sinks that do not fit the window, for a max_distance that is too small, and for
    a rotary embedding of another size.
    """

    shows_weights = False

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        num_kv_heads: int | None = None,
        mix: Mix = MIX,
        local_window: int | None = LOCAL_WINDOW,
        sink_tokens: int | None = None,
        chunk_size: int = CHUNK_SIZE,
        top_k: int = TOP_K,
        longterm_positions: LongTermPositions = POSITIONS,
        max_distance: int | None = None,
        session_decay: SessionDecay = SESSION_DECAY,
        session_stride: int = SESSION_STRIDE,
        session_slots: int | None = SESSION_SLOTS,
        router_size: int | None = None,
        head_dim: int | None = None,
        bias: Bias = False,
        rotary: RotaryEmbedding | None = None,
    ) -> None:
        if mix not in MIXES:
            raise unknown_name("mix", mix, MIXES)
        if longterm_positions not in LONGTERM_POSITIONS:
            raise unknown_name("longterm_positions", longterm_positions, LONGTERM_POSITIONS)
        # Without a window nothing lies outside it. A negative top_k is kept for its
        # check to see.
        if local_window is None:
            top_k = min(top_k, 0)
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
        super().__init__(
            hidden_size, num_heads, num_kv_heads, local_window, *shared, mix_by_head=mix == "joint"
        )
        check_whole("session_stride", session_stride, 1)
        check_whole("session_slots", session_slots, 1)
        self.is_joint = mix == "joint"
        # The window of the joint mix reaches back by up to chunk_size - 1 more tokens,
        # and all keys in a window are read at their true distance.
        least = (local_window or 0) + chunk_size + self.sink_tokens
        if max_distance is not None and max_distance < least:
            raise InputError(
                f"max_distance is {max_distance}; it must be at least local_window, chunk_size "
                f"and sink_tokens together, {least}"
            )
        self.session_stride = session_stride
        self.session_slots = session_slots
        self.longterm_positions = longterm_positions

    @property
    def window_begins(self) -> int:
        """The window is extended back to a multiple of this many tokens; 1: not at
        all."""
        # One softmax must count every key once: it is in the window or in a chunk,
        # never in both.
        return self.chunk_size if self.is_joint and self.top_k else 1

    @property
    def hidden_sinks(self) -> int:
        """First tokens of a row that are not read in their chunk, because every window
        has them."""
        return self.sink_tokens

    @property
    def stands_apart(self) -> bool:
        """Whether retrieved keys are read at their own distance."""
        return self.rotary is not None and self.longterm_positions == "true"

    @property
    def slots_read(self) -> int | None:
        """How many of the latest slots a token reads; None: all."""
        # Slots are rotated to their true positions, so those beyond max_distance are
        # left out.
        if self.rotary is None or self.max_distance is None:
            return self.session_slots
        reachable = max(1, self.max_distance // self.session_stride)
        return reachable if self.session_slots is None else min(self.session_slots, reachable)

    def mix(self, x: Tensor, positions: Tensor | None, state: State | None) -> Tensor:
        """Query, one read per level, mix them, project back; see
        `CausalAttention.mix`."""
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
            # Chunks are chosen by their share in one softmax with the window. Their
            # bias is the same for all of them: subtracting it here is adding it there.
            window = None if biases is None else local.sums - biases[..., LONG_TERM]
            reads += [
                (LONG_TERM, read)
                for read in self.read_long_term(raw, rotated, v, window, positions, state)
            ]
        o = self.routed(q, reads, t, state) if biases is None else self.joint(reads, biases)
        return self.o_proj(o.flatten(2))

    def joint(self, reads: list[tuple[int, Read]], biases: Tensor) -> Tensor:
        """o (B, T, H, D): one softmax over all (level, read), given the biases (B, T,
        H, M)."""
        factor = self.router.session_factor()
        if self.silent is not None:
            reads = silenced(reads, self.silent)
        # The window is the reference: its bias is 0 by definition, so nothing is added.
        weights = shares_of(
            [read for _, read in reads],
            [None if level == LOCAL else biases[..., level] for level, _ in reads],
            [factor if level == SESSION else None for level, _ in reads],
        )
        if self.watcher is not None:
            self.watcher(
                Watched.of([level for level, _ in reads], weights, [read for _, read in reads])
            )
        return mixed(weights, [read for _, read in reads])

    def routed(
        self, q: Tensor, reads: list[tuple[int, Read]], t: Tensor, state: State | None
    ) -> Tensor:
        """o (B, T, H, D): the sum over levels of the router's weight times what is read
        there.

        q (B, T, H, D) before any rotary embedding; t (B or 1, T): token indices.
        """
        weights = self.weights_at(q, t, self.session_stride - 1, state).to(q.dtype)
        levels: dict[int, list[Read]] = {}
        for level, read in reads:
            levels.setdefault(level, []).append(read)
        parts = []
        for level, found in levels.items():
            # Chunks nearby and chunks beyond max_distance are one softmax: they share
            # one weight.
            read = both(*found) if len(found) > 1 else found[0]
            parts.append(weights[..., level, None, None] * read.values)
        return sum_of(parts)

    def read_session(
        self, q: Tensor, m: Tensor, positions: Tensor | None, state: State | None
    ) -> Read:
        """What rotated queries q (B, T, H, D) read in the session slots; zeros before
        the first.

        m (B, T, C): the session average at every token. Slot i is that of token (i + 1)
        stride - 1, and is visible from this token on.
        """
        stride, first = self.session_stride, self.session_stride - 1
        if state is None:
            k, v = self.slots(
                m[:, first::stride], None if positions is None else positions[..., first::stride]
            )
        else:
            # Rows of different lengths complete their slots at different columns.
            columns = slot_columns(stride, m.shape[1], state)
            rows = torch.arange(m.shape[0], device=m.device)[:, None]
            places = None if positions is None else positions.expand(m.shape[:2])[rows, columns]
            k, v = self.slots(m[rows, columns], places)
        return attend_slots(q, k, v, stride, self.slots_read, state, SLOTS, lse=self.is_joint)

    def slots(self, m: Tensor, positions: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rotated keys and values (B, N, G, D) of N session averages m (B, N, C)."""
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
        """What queries read in the chunks that they retrieve.

        Args:
            raw: queries (B, T, H, D) and keys (B, T, G, D) before any rotary embedding.
            rotated: the same, rotated to their positions.
            v: (B, T, G, D), values.
            window: (B, T, H), with the joint mix: the log-sum-exp of what each head
                reads in its window, less the bias of this level. None: the routed mix.
            positions: (T,) or (B or 1, T); None without rotary embeddings.
            state: to read from and to write to. None: this call is the whole row.

        Returns no read if no token has a candidate, and two if some chunks are read at
        their own distance and others at `max_distance`.
        """
        q, k = rotated if self.stands_apart else (self.at_edge(raw[0]), raw[1])
        chunks = self.chunks(k, v, k if self.is_joint else raw[1], positions, state)
        if chunks is None:
            return []
        near, places = None, chunks.places
        if places is not None and positions is not None:
            near = near_at(positions, places, self.max_distance, chunks.banked)
        # One rotation serves all distant chunks: their keys are turned as if they began
        # at 0, and the query as if it were max_distance away from there.
        q_far = q if near is None else self.rotate(raw[0], self.farthest(q))
        asked, limits = asked_at(v, state), self.limits(state)

        def meetings(retrieved: Retrieved) -> list[Meeting]:
            """The retrieved chunks by the way in which they are read: near, and
            beyond."""
            if near is None or places is None:
                return [Meeting(q, retrieved)]
            close_by, beyond = retrieved.split(near)
            back = -places.expand(len(v), -1)

            def turn(k: Tensor, row: Tensor, chunk: Tensor) -> Tensor:
                """Keys (N, c, D) as if their chunk began at position 0."""
                return self.turned(k.unsqueeze(2), back[row, chunk].unsqueeze(1)).squeeze(2)

            return [Meeting(q, close_by), Meeting(q_far, beyond, turn)]

        # The paper's form finds chunks before any rotary embedding. The joint mix finds
        # them by keys as they will be read: the means propose a few, and all keys of
        # those decide.
        if window is None:
            retrieved = retrieve(self.index_queries(raw[0]), chunks.means, limits, asked)
        else:
            far = (
                None
                if near is None or chunks.far_means is None
                else AsRead(q_far, chunks.far_means)
            )
            wider = limits._replace(top_k=self.proposed(chunks.means.shape[1]))
            by_keys = wider.top_k > self.top_k
            retrieved = retrieve_as_read(
                AsRead(q, chunks.means), far, near, wider, asked, by_place=by_keys
            )
            if by_keys:
                retrieved = rerank(meetings(retrieved), chunks, retrieved, window, limits)
        self.watched(retrieved)
        found = meetings(retrieved)
        # Two reads of one level have to be merged, whatever the mix.
        lse = self.is_joint or len(found) > 1
        return [
            attend_held(meeting, chunks, self.chunk_size, self.hidden_sinks, lse=lse)
            for meeting in found
        ]

    def chunks(
        self, k: Tensor, v: Tensor, found_by: Tensor, positions: Tensor | None, state: State | None
    ) -> Chunks | None:
        """The chunks that the tokens of this call can choose from; None if no token
        can.

        Args:
            k, v: (B, T, G, D), this call's keys and values; the chunks they complete
            are included.
            found_by: (B, T, G, D), the keys whose mean a chunk is found by.
            positions: (T,) or (B or 1, T); None without rotary embeddings.
            state: to read from and to write to. None: this call is the whole row.
        """
        if state is None:
            if not self.num_candidates(v.shape[1]):
                return None
            means = chunk_means(found_by, self.chunk_size, self.sink_tokens).to(k.dtype)
            places = self.places(v, positions, None)
            far_means = None if places is None else self.turned(means, -places)
            return Chunks(k, v, means, far_means, places)
        self.write_chunks(k, v, found_by, positions, state)
        # Chunks are written whether or not any can be read yet: later calls will need
        # them.
        if not self.can_retrieve(state):
            return None
        # Tokens kept on the host or on disk are fetched chunk by chunk, after they are
        # chosen.
        keys, values = (state.records(x) if state.is_apart(x) else state.all(x) for x in TOKENS)
        if not self.stands_apart:
            return Chunks(keys, values, state.all(MEAN), banked=state.banked)
        places = state.all(PLACE).squeeze(2)
        return Chunks(keys, values, state.all(MEAN), state.all(FAR_MEAN), places, state.banked)

    def write_chunks(
        self, k: Tensor, v: Tensor, found_by: Tensor, positions: Tensor | None, state: State
    ) -> None:
        """Add this call's tokens to the state, and mean keys and positions of the
        chunks that they complete; the arguments are those of `chunks`."""
        for name, x in zip(TOKENS, (k, v), strict=True):
            state.write(name, x)
        fresh = write_chunk_means(found_by, self.chunk_size, state, self.sink_tokens)
        places = self.places(v, positions, state) if fresh.shape[1] else None
        if places is not None:
            state.write(PLACE, places.expand(len(v), -1).unsqueeze(2))
            state.write(FAR_MEAN, self.turned(fresh.to(k.dtype), -places))

    def places(self, x: Tensor, positions: Tensor | None, state: State | None) -> Tensor | None:
        """The positions (B or 1, N) of the first tokens of the chunks that x (B, T,
        ...) completes; None if chunks are not read at their own distance."""
        if not self.stands_apart or positions is None:
            return None
        positions = positions.expand(x.shape[:2]) if positions.dim() == 2 else positions[None]
        if state is None:
            last = positions[:, self.chunk_size - 1 :: self.chunk_size]
        else:
            columns = last_of_chunks(x, self.chunk_size, state)
            last = positions.expand(x.shape[:2]).gather(1, columns.expand(len(x), -1))
        # From the last token backward, because the first may belong to an earlier call.
        return last - (self.chunk_size - 1)

    def turned(self, x: Tensor, by: Tensor) -> Tensor:
        """x (B, N, G, D), which is already rotated, rotated further by positions (B or
        1, N)."""
        # Rotations add up. Scaling (YaRN) is applied once, when keys are first rotated.
        return x if self.rotary is None else self.rotary.turn(x, by)

    def farthest(self, x: Tensor) -> Tensor:
        """(1,): the distance, in tokens, at which chunks beyond `max_distance` are
        read."""
        # Without a limit only a bank's chunks are read there, at the edge of the widest
        # window.
        return torch.tensor(
            [self.max_distance or (self.local_window or 0) + self.chunk_size - 1], device=x.device
        )

    def proposed(self, candidates: int) -> int:
        """How many of `candidates` chunks the mean keys propose; if this is `top_k`,
        all of them are read."""
        return (
            max(self.top_k, min(PROPOSED * self.top_k, candidates)) if self.is_joint else self.top_k
        )

    def index_queries(self, q: Tensor) -> Tensor:
        """q (B, T, H, D) before any rotary embedding -> (B, T, G, D), the sum of each
        group."""
        # A sum of inner products with one key is the inner product with the sum.
        return q.unflatten(2, (self.num_kv_heads, -1)).sum(3)

    def at_edge(self, q: Tensor) -> Tensor:
        """q (B, T, H, D) before any rotary embedding, for keys that are not rotated
        either: moved to the window's edge ("clamped"), or unchanged ("none")."""
        if self.longterm_positions == "none":
            return q
        return self.rotate(q, torch.tensor([self.local_window or 0], device=q.device))

    @property
    def local_stores(self) -> tuple[str, str]:
        """Names of the stores, in a state, of the window's keys and values."""
        # L3 keeps all tokens, perhaps on another device, so the window then has stores
        # of its own.
        return LOCAL_TOKENS if self.top_k else TOKENS

    def state_entries(self, dtype: torch.dtype) -> dict[str, Entry]:
        """The stores of a state: k and v of the window and the sinks, and of all tokens
        with L3; the session average and its slots; and what chunks are found by."""
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
        """FLOPs of the forward pass of one token, the last of `context` (see
        `CausalAttention`)."""
        c, kv, candidates = self.hidden_size, self.kv_size, self.num_candidates(context)
        inner = self.inner_size
        flops = super().flops_per_token(context)
        if self.session is not None:
            slots, fresh = divmod(context, self.session_stride)
            slots = slots if self.slots_read is None else min(slots, self.slots_read)
            flops += 4 * inner * slots + 4 * c * kv * (fresh == 0)
        scored = inner if self.is_joint else kv
        chosen, proposed = min(self.top_k, candidates), self.proposed(candidates)
        # Proposed chunks are scored by their keys alone; those that are chosen are read
        # in full.
        by_keys = proposed if proposed > self.top_k else 0
        return (
            flops + 2 * scored * candidates + 2 * inner * self.chunk_size * (by_keys + 2 * chosen)
        )
