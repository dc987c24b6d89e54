"""Slow and obvious twins of every mechanism, row by row and token by token: the
specification in code, which tests compare the mechanisms with.

`naive(attn, x, positions, valid)` returns what `attn(x, positions, valid)[0]` must
return. A row's padding is dropped before anything else happens. Each twin is a loop
that takes one token, adds it to the lists that a cache would hold, and reads from those
lists alone.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from mka.attention.base import CausalAttention
from mka.attention.fmka import FastMemoryKeyedAttention
from mka.attention.gqa import GroupedQueryAttention
from mka.attention.grouped import MemoryAttention
from mka.attention.mka import MemoryKeyedAttention
from mka.attention.mla import MultiHeadLatentAttention
from mka.ops.rotary import RotaryEmbedding


def naive(
    attn: CausalAttention, x: Tensor, positions: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """y (B, T, C) of any mechanism, zeros at padding; the arguments are those of
    `CausalAttention.forward`.

    Raises ValueError for a mechanism without a twin.
    """
    y = torch.zeros_like(x)
    for row in range(x.shape[0]):
        # Padding is gone before a twin starts: it can only see what is valid.
        kept = torch.arange(x.shape[1]) if valid is None else valid[row].nonzero().squeeze(1)
        places = (
            torch.arange(len(kept))
            if positions is None
            else positions.expand(x.shape[:2])[row, kept]
        )
        outputs = twin_of(attn)(attn, x[row, kept], places)
        # Not in place, so that gradients can be compared too.
        y = y.index_put((torch.tensor(row), kept), torch.stack(list(outputs))) if len(kept) else y
    return y


def twin_of(attn: CausalAttention) -> Callable[..., Iterator[Tensor]]:
    """The twin of a mechanism. Raises ValueError if there is none."""
    # By isinstance: mha and mqa are subclasses of gqa, and share its twin.
    for kind, twin in TWINS.items():
        if isinstance(attn, kind):
            return twin
    raise ValueError(
        f"{type(attn).__name__} has no naive twin; twins: "
        f"{', '.join(kind.__name__ for kind in TWINS)}"
    )


def all_scores(q: Tensor, keys: list[Tensor]) -> Tensor:
    """Scores q . k / sqrt(D), (H, N), of one query (H, D) and a list of N keys (G,
    D)."""
    # Heads of a group are adjacent: (H, D) is (G, H / G, D).
    k = torch.stack(keys, dim=1)
    return (q.unflatten(0, (k.shape[0], -1)) @ k.mT / q.shape[-1] ** 0.5).flatten(0, 1)


def weighed(
    scores: Tensor, values: list[Tensor], empty: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(scores) v (H, D) and the log-sum-exps (H,), for scores (H, N) and N
    values (G, D).

    empty: (H,), scores of one more key, of value 0. Default: None, no such key.

    Where all scores are -inf, the result is zeros and -inf.
    """
    if empty is not None:
        scores = torch.cat([scores, empty[:, None]], dim=1)
        values = [*values, torch.zeros_like(values[0])]
    v = torch.stack(values, dim=1)
    weights = scores.softmax(-1) if scores.isfinite().any() else torch.zeros_like(scores)
    return (weights.unflatten(0, (v.shape[0], -1)) @ v).flatten(0, 1), scores.logsumexp(-1)


def place(rotary: RotaryEmbedding | None, x: Tensor, position: Tensor | int) -> Tensor:
    """One token's heads (H, D) rotated to its position; unchanged without rotary
    embeddings."""
    if rotary is None:
        return x
    return rotary(x[None, None], torch.as_tensor(position).reshape(1))[0, 0]


def naive_gqa(attn: GroupedQueryAttention, x: Tensor, positions: Tensor) -> Iterator[Tensor]:
    """Keys and values are kept in lists; each query reads those in its window."""
    keys, values = [], []
    for x_t, position in zip(x, positions, strict=True):
        keys.append(place(attn.rotary, attn.keys(x_t), position))
        values.append(attn.values(x_t))
        t = len(keys) - 1
        seen = window_tokens(attn, t)
        scores = local_scores(attn, attn.queries(x_t), position, keys, seen, t)
        yield attn.o_proj(weighed(scores, [values[s] for s in seen], attn.sink_logits)[0].flatten())


def naive_mla(attn: MultiHeadLatentAttention, x: Tensor, positions: Tensor) -> Iterator[Tensor]:
    """The absorbed form: only z and the rotary key are kept; Wuk is folded into the
    query, Wuv into the output."""
    # It shares no code with `MultiHeadLatentAttention.absorbed`, or a test would prove
    # nothing.
    w_uk = attn.k_up_proj.weight.unflatten(0, (attn.num_heads, -1))
    w_uv = attn.v_up_proj.weight.unflatten(0, (attn.num_heads, -1))
    latents, rope_keys = [], []
    for x_t, position in zip(x[:, None, None], positions, strict=True):
        q = attn.queries(x_t, position.reshape(1))[0, 0]
        q_nope, q_rope = q[:, : attn.head_dim], q[:, attn.head_dim :]
        z_t, k_rope = attn.latent(x_t, position.reshape(1))
        latents.append(z_t[0, 0])
        rope_keys.append(q_rope[0] if k_rope is None else k_rope[0, 0, 0])
        seen = window_tokens(attn, len(latents) - 1)
        z, rope = torch.stack([latents[s] for s in seen]), torch.stack([rope_keys[s] for s in seen])
        scores = (q_nope.unsqueeze(1) @ w_uk).squeeze(1) @ z.T + q_rope @ rope.T
        if attn.bias:
            scores = scores + (q_nope * attn.k_up_proj.bias.unflatten(0, (attn.num_heads, -1))).sum(
                -1, keepdim=True
            )
        read = (scores / q.shape[-1] ** 0.5).softmax(-1) @ z
        o = (w_uv @ read.unsqueeze(-1)).flatten()
        yield attn.o_proj(o + attn.v_up_proj.bias if attn.bias else o)


def naive_mka(attn: MemoryKeyedAttention, x: Tensor, positions: Tensor) -> Iterator[Tensor]:
    """Window, session slots and the best chunks, mixed by one softmax (joint) or by the
    router (routed)."""
    placed, raw, values, slots, slot_values, places = [], [], [], [], [], []
    session, chunks = Session(attn), Chunks(attn)
    for t, (x_t, position) in enumerate(zip(x, positions, strict=True)):
        q = attn.queries(x_t)
        raw.append(attn.keys(x_t))
        placed.append(place(attn.rotary, raw[-1], position))
        values.append(attn.values(x_t))
        places.append(position)
        m = session.add(x_t)
        # The token that completes a slot or a chunk reads it already, so both come
        # first.
        if m is not None and (t + 1) % attn.session_stride == 0:
            slots.append(place(attn.rotary, attn.keys(m), position))
            slot_values.append(attn.values(m))
        if attn.slots_read is not None:
            del slots[: -attn.slots_read], slot_values[: -attn.slots_read]
        seen = window_tokens(attn, t)
        scores = local_scores(attn, q, position, placed, seen, t)
        local = weighed(scores, [values[s] for s in seen], attn.sink_logits)
        session_read = torch.zeros_like(q), q.new_full((len(q),), -torch.inf)
        if slots:
            session_read = weighed(all_scores(place(attn.rotary, q, position), slots), slot_values)
        if attn.top_k and (t + 1) % attn.chunk_size == 0:
            chunks.add(raw, places)
        logits = router_logits(attn, q) if attn.is_joint else None
        window = local[1] if logits is None else local[1] - (logits[2] - logits[0])
        levels = [local, session_read, read_chunks(attn, q, t, position, values, chunks, window)]
        yield attn.o_proj(mixed(attn, q, levels, logits).flatten())


def mixed(
    attn: MemoryKeyedAttention,
    q: Tensor,
    levels: list[tuple[Tensor, Tensor]],
    logits: Tensor | None,
) -> Tensor:
    """What the levels have read, as one result (H, D).

    Args:
        attn: the mechanism, for its router.
        q: (H, D), the query before any rotary embedding.
        levels: values (H, D) and log-sum-exps (H,) of each of the M levels.
        logits: (M, H), the router's, for one softmax over the levels (joint). None: the
            sum by the router's weights (routed).
    """
    reads, sums = (torch.stack(parts) for parts in zip(*levels, strict=True))
    exists = sums[:, 0] > -torch.inf
    if logits is None:
        return (route(attn, q, exists.tolist())[:, None, None] * reads).sum(0)
    # The gate of a conversion shuts the session level alone; see
    # `Router.session_factor`.
    share = torch.stack([torch.ones(()), attn.router.gate.clamp(min=0).cpu(), torch.ones(())])
    share = share.to(reads)
    weights = (sums + logits - logits[0]).softmax(0) * share[:, None]
    return ((weights / weights.sum(0)).unsqueeze(-1) * reads).sum(0)


def router_logits(attn: MemoryKeyedAttention, q: Tensor) -> Tensor:
    """The router's logits (M, H) for a query (H, D) before any rotary embedding."""
    hidden = torch.nn.functional.silu(attn.router.hidden(q.flatten()))
    return attn.router.output(hidden).view(-1, 3).T


def local_scores(
    attn: CausalAttention, q: Tensor, position: Tensor, keys: list[Tensor], seen: list[int], t: int
) -> Tensor:
    """Scores (H, N) of one query in its window, with sinks no further away than
    `max_distance`.

    Args:
        attn: the mechanism.
        q: (H, D), before any rotary embedding.
        position: (), the query's position.
        keys: (G, D) each, rotated, of all tokens so far.
        seen: the N token indices that are read, in order.
        t: the query's token index.
    """
    here, limit = place(attn.rotary, q, position), attn.max_distance
    if (
        attn.rotary is None
        or limit is None
        or t <= limit
        or not attn.sink_tokens
        or attn.local_window is None
    ):
        return all_scores(here, [keys[s] for s in seen])
    sinks = [s for s in seen if s < attn.sink_tokens]
    others = [s for s in seen if s >= attn.sink_tokens]
    # Token 0 is at position - t, so this query is max_distance away from it.
    far = place(attn.rotary, q, position - t + limit)
    return torch.cat(
        [all_scores(far, [keys[s] for s in sinks]), all_scores(here, [keys[s] for s in others])],
        dim=1,
    )


class Chunks:
    """The completed chunks of a row.

    `met` holds the keys of their tokens, rotated to the place within the chunk ("true")
    or not at all; `starts` the positions where chunks begin; `means` the mean keys that
    chunks are found by.

    attn: the mechanism.
    """

    def __init__(self, attn: MemoryKeyedAttention) -> None:
        self.attn = attn
        self.met: list[Tensor] = []
        self.starts: list[Tensor] = []
        self.means: list[Tensor] = []

    def add(self, keys: list[Tensor], places: list[Tensor]) -> None:
        """Add the chunk that the last of all keys (G, D) so far, not rotated,
        completes.

        places: their positions.
        """
        attn, size = self.attn, self.attn.chunk_size
        first, start = len(keys) - size, places[-1] - (size - 1)
        apart = attn.longterm_positions == "true"
        met = [
            place(attn.rotary, k, p - start) if apart else k
            for k, p in zip(keys[first:], places[first:], strict=True)
        ]
        # Joint: found by keys as they will be read. Routed: by keys before any rotary
        # embedding.
        found_by = met if attn.is_joint else keys[first:]
        self.met += met
        self.starts.append(start)
        # Sinks are not read in their chunk, so it is not found by them either.
        seen = found_by[max(0, attn.sink_tokens - first) :] or found_by
        self.means.append(torch.stack(seen).mean(0))

    def queries(self, q: Tensor, position: Tensor, chunks: list[int]) -> Tensor:
        """One query (H, D) as it meets each of J chunks, (J, H, D): rotated by its
        distance from where they begin ("true"), to the window's edge ("clamped"), or
        not at all ("none")."""
        attn = self.attn
        if attn.rotary is None or attn.longterm_positions == "none":
            return q.expand(len(chunks), -1, -1)
        if attn.longterm_positions == "clamped":
            return place(attn.rotary, q, attn.local_window or 0).expand(len(chunks), -1, -1)
        distance = position - torch.stack([self.starts[j] for j in chunks])
        if attn.max_distance is not None:
            distance = distance.clamp(max=attn.max_distance)
        return attn.rotary(q.expand(1, len(chunks), -1, -1), distance)[0]


def read_chunks(
    attn: MemoryKeyedAttention,
    q: Tensor,
    t: int,
    position: Tensor,
    values: list[Tensor],
    held: Chunks,
    window: Tensor,
) -> tuple[Tensor, Tensor]:
    """What one query reads in the chunks that its groups choose: values (H, D),
    log-sum-exps (H,).

    Args:
        attn: the mechanism.
        q: (H, D), before any rotary embedding.
        t, position: the query's token index and position.
        values: (G, D) each, of all tokens so far.
        held: the chunks completed so far.
        window: (H,), the log-sum-exps of what the query reads in its window, less the
            bias of the long-term level.
    """
    size, groups, root = attn.chunk_size, attn.num_kv_heads, q.shape[-1] ** 0.5
    # Chunks whose last token is before the window, and not of sinks alone.
    completed = max(0, (t + 1 - (attn.local_window or 0)) // size) if attn.top_k else 0
    chunks = [j for j in range(completed) if (j + 1) * size > attn.sink_tokens]
    if not chunks:
        return torch.zeros_like(q), q.new_full((len(q),), -torch.inf)
    asking = held.queries(q, position, chunks).unflatten(1, (groups, -1))  # (J, G, R, D)
    means = torch.stack([held.means[j] for j in chunks])  # (J, G, D)
    reads, sums = [], []
    for group in range(groups):
        if attn.is_joint:
            scores = (asking[:, group] @ means[:, group, :, None]).squeeze(2).T / root  # (R, J)
            mass = scores.softmax(1).sum(0)
        else:
            summed = q.unflatten(0, (groups, -1))[group].sum(0)
            mass = (means[:, group] @ summed[:, None]).squeeze(1)

        def scores_of(i: int, group: int = group) -> Tensor:
            """Scores (R, c) of the tokens of the i-th candidate, -inf where they are
            sinks."""
            tokens = torch.arange(chunks[i] * size, (chunks[i] + 1) * size)
            scores = all_scores(asking[i, group], [held.met[s][group, None] for s in tokens])
            return scores.masked_fill(tokens < attn.sink_tokens, -torch.inf)

        chosen = best(mass, attn.top_k)
        # Means propose; the share of all their keys in one softmax with the window
        # decides.
        if (count := attn.proposed(len(chunks))) > attn.top_k:
            proposed = sorted(best(mass, count))
            totals = torch.stack([scores_of(i).logsumexp(1) for i in proposed])  # (N, R)
            total = torch.logaddexp(window.unflatten(0, (groups, -1))[group], totals.logsumexp(0))
            chosen = [proposed[i] for i in best((totals - total).logsumexp(1), attn.top_k)]
        tokens = [s for i in chosen for s in range(chunks[i] * size, (chunks[i] + 1) * size)]
        scores = torch.cat([scores_of(i) for i in chosen], dim=1)
        read, total = weighed(scores, [values[s][group, None] for s in tokens])
        reads.append(read)
        sums.append(total)
    return torch.cat(reads), torch.cat(sums)


def naive_fmka(attn: FastMemoryKeyedAttention, x: Tensor, positions: Tensor) -> Iterator[Tensor]:
    """Each key token's memories are fused first; then one attention over the window."""
    keys, values, means, index_keys = [], [], [], []
    session = Session(attn)
    for t, (x_t, position) in enumerate(zip(x, positions, strict=True)):
        q = attn.queries(x_t)
        m = session.add(x_t)
        if attn.top_k and (t + 1) % attn.chunk_size == 0:
            means.append(x[t + 1 - attn.chunk_size : t + 1].mean(0))
            index_keys.append(attn.index_k_proj(means[-1]))
        # Without a window every completed chunk is a candidate: what is read are
        # summaries.
        candidates = (
            max(0, (t + 1 - (attn.local_window or 0)) // attn.chunk_size) if attn.top_k else 0
        )
        r = torch.zeros_like(x_t)
        u = attn.index_q_proj(x_t) if attn.top_k else x_t
        if candidates:
            scores = (torch.stack(index_keys[:candidates]) @ u[:, None]).squeeze(1)
            chosen = best(scores, attn.top_k)
            r = (
                scores[None, chosen].softmax(-1) @ torch.stack([means[j] for j in chosen])
            ).squeeze(0)
        mix = route(attn, q, [True, m is not None, candidates > 0])
        f = mix[0] * x_t + mix[1] * (x_t * 0 if m is None else m) + mix[2] * r
        keys.append(place(attn.rotary, attn.keys(f), position))
        values.append(attn.values(f))
        seen = window_tokens(attn, t)
        scores = local_scores(attn, q, position, keys, seen, t)
        yield attn.o_proj(weighed(scores, [values[s] for s in seen], attn.sink_logits)[0].flatten())


class Session:
    """The session average as the specification writes it: m = a m + (1 - a) x, read as
    m / (1 - a^n).

    attn: the mechanism, for its decay a.
    """

    def __init__(self, attn: MemoryAttention) -> None:
        self.level = attn.session
        self.m: Tensor | float = 0.0
        self.n = 0

    def add(self, x_t: Tensor) -> Tensor | None:
        """The bias-corrected average (C,) after one more token x_t (C,); None without a
        session level."""
        if self.level is None:
            return None
        a = self.level.decay(x_t)
        self.m = a * self.m + (1 - a) * x_t
        self.n += 1
        return self.m / (1 - a**self.n)


def route(attn: MemoryAttention, q: Tensor, exists: list[bool]) -> Tensor:
    """The router's weights (M,) for one query (H, D), 0 for levels that do not
    exist."""
    logits = attn.router.output(torch.nn.functional.silu(attn.router.hidden(q.flatten())))
    mix = logits.masked_fill(~torch.tensor(exists), -torch.inf).softmax(-1)
    local = torch.tensor([1.0, 0.0, 0.0], dtype=mix.dtype)
    return local + attn.router.gate * (mix - local)


def best(scores: Tensor, top_k: int) -> list[int]:
    """Indices of the `top_k` largest scores (N,), largest first; the earlier one wins a
    tie."""
    return sorted(range(len(scores)), key=lambda j: (-scores[j].item(), j))[:top_k]


def window_tokens(attn: CausalAttention, t: int) -> list[int]:
    """Indices of the tokens that token t reads in L1: its window, and the sinks before
    it."""
    if attn.local_window is None:
        return list(range(t + 1))
    first = t + 1 - attn.local_window
    if isinstance(attn, MemoryKeyedAttention) and attn.is_joint and attn.top_k:
        # Back to the beginning of a chunk, so that no token is between window and
        # chunks.
        first = first // attn.chunk_size * attn.chunk_size
    return [s for s in range(t + 1) if s >= first or s < attn.sink_tokens]


# After the functions, which it names.
TWINS: dict[type[CausalAttention], Callable[..., Iterator[Tensor]]] = {
    GroupedQueryAttention: naive_gqa,
    MultiHeadLatentAttention: naive_mla,
    MemoryKeyedAttention: naive_mka,
    FastMemoryKeyedAttention: naive_fmka,
}
