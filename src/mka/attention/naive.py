"""The slow and obvious twins: every mechanism, row by row and token by token. They are the specification in code.

`naive(attn, x, positions, valid)` gives what `attn(x, positions, valid)[0]` must give. A row's padding is dropped
before anything else happens. Each twin is a loop that takes one token, adds it to the lists that a cache would hold,
and reads from those lists alone; `attend` is one query against a list of keys.
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


def naive(attn: CausalAttention, x: Tensor, positions: Tensor | None = None, valid: Tensor | None = None) -> Tensor:
    """y (B, T, C) of any mechanism; zeros at padding."""
    y = torch.zeros_like(x)
    for row in range(x.shape[0]):
        kept = torch.arange(x.shape[1]) if valid is None else valid[row].nonzero().squeeze(1)
        places = torch.arange(len(kept)) if positions is None else positions.expand(x.shape[:2])[row, kept]
        outputs = twin_of(attn)(attn, x[row, kept], places)
        y = y.index_put((torch.tensor(row), kept), torch.stack(list(outputs))) if len(kept) else y
    return y


def twin_of(attn: CausalAttention) -> Callable[..., Iterator[Tensor]]:
    for kind, twin in TWINS.items():
        if isinstance(attn, kind):
            return twin
    raise ValueError(f"{type(attn).__name__} has no naive twin; twins: {', '.join(kind.__name__ for kind in TWINS)}")


def attend(q: Tensor, keys: list[Tensor], values: list[Tensor]) -> Tensor:
    """One query (H, D) against lists of (G, D): softmax(q k / sqrt(D)) v, (H, D)."""
    k, v = torch.stack(keys, dim=1), torch.stack(values, dim=1)
    grouped = q.unflatten(0, (k.shape[0], -1))
    weights = (grouped @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    return (weights @ v).flatten(0, 1)


def place(rotary: RotaryEmbedding | None, x: Tensor, position: Tensor | int) -> Tensor:
    """One token's heads (H, D), rotated to its position."""
    if rotary is None:
        return x
    return rotary(x[None, None], torch.as_tensor(position).reshape(1))[0, 0]


def naive_gqa(attn: GroupedQueryAttention, x: Tensor, positions: Tensor) -> Iterator[Tensor]:
    keys, values = [], []
    for x_t, position in zip(x, positions, strict=True):
        q = place(attn.rotary, attn.queries(x_t), position)
        keys.append(place(attn.rotary, attn.keys(x_t), position))
        values.append(attn.values(x_t))
        first = window_start(attn, len(keys))
        yield attn.o_proj(attend(q, keys[first:], values[first:]).flatten())


def naive_mla(attn: MultiHeadLatentAttention, x: Tensor, positions: Tensor) -> Iterator[Tensor]:
    """The absorbed form: only z and the rotary key are kept; Wuk is folded into the query, Wuv into the output."""
    w_uk = attn.k_up_proj.weight.unflatten(0, (attn.num_heads, -1))
    w_uv = attn.v_up_proj.weight.unflatten(0, (attn.num_heads, -1))
    latents, rope_keys = [], []
    for x_t, position in zip(x[:, None, None], positions, strict=True):
        q = attn.queries(x_t, position.reshape(1))[0, 0]
        q_nope, q_rope = q[:, : attn.head_dim], q[:, attn.head_dim :]
        z_t, k_rope = attn.latent(x_t, position.reshape(1))
        latents.append(z_t[0, 0])
        rope_keys.append(q_rope[0] if k_rope is None else k_rope[0, 0, 0])
        first = window_start(attn, len(latents))
        z, rope = torch.stack(latents[first:]), torch.stack(rope_keys[first:])
        scores = (q_nope.unsqueeze(1) @ w_uk).squeeze(1) @ z.T + q_rope @ rope.T
        if attn.bias:
            scores = scores + (q_nope * attn.k_up_proj.bias.unflatten(0, (attn.num_heads, -1))).sum(-1, keepdim=True)
        read = (scores / q.shape[-1] ** 0.5).softmax(-1) @ z
        o = (w_uv @ read.unsqueeze(-1)).flatten()
        yield attn.o_proj(o + attn.v_up_proj.bias if attn.bias else o)


def naive_mka(attn: MemoryKeyedAttention, x: Tensor, positions: Tensor) -> Iterator[Tensor]:
    placed, raw, values, slots, slot_values, summaries = [], [], [], [], [], []
    session = Session(attn)
    for t, (x_t, position) in enumerate(zip(x, positions, strict=True)):
        q = attn.queries(x_t)
        raw.append(attn.keys(x_t))
        placed.append(place(attn.rotary, raw[-1], position))
        values.append(attn.values(x_t))
        m = session.add(x_t)
        if m is not None and (t + 1) % attn.session_stride == 0:
            slots.append(place(attn.rotary, attn.keys(m), position))
            slot_values.append(attn.values(m))
        if (t + 1) % attn.chunk_size == 0:
            summaries.append(torch.stack(raw[-attn.chunk_size :]).mean(0))
        first = window_start(attn, t + 1)
        query = place(attn.rotary, q, position)
        reads = [attend(query, placed[first:], values[first:])]
        if attn.session_slots is not None:
            del slots[: -attn.session_slots], slot_values[: -attn.session_slots]
        reads.append(attend(query, slots, slot_values) if slots else torch.zeros_like(q))
        candidates = attn.num_candidates(t + 1)
        reads.append(read_chunks(attn, q, raw, values, summaries[:candidates]))
        mix = route(attn, q, [True, bool(slots), candidates > 0])
        yield attn.o_proj((mix[:, None, None] * torch.stack(reads)).sum(0).flatten())


def read_chunks(
    attn: MemoryKeyedAttention, q: Tensor, keys: list[Tensor], values: list[Tensor], summaries: list[Tensor]
) -> Tensor:
    """One query over the tokens of the chunks its groups choose, all at one distance."""
    if not summaries:
        return torch.zeros_like(q)
    queries = q.unflatten(0, (attn.num_kv_heads, -1))
    distance = 0 if attn.longterm_positions == "none" else attn.local_window or 0
    at_edge = place(attn.rotary, q, distance).unflatten(0, (attn.num_kv_heads, -1))
    reads = []
    for group in range(attn.num_kv_heads):
        scores = (torch.stack([s[group] for s in summaries]) @ queries[group].sum(0)[:, None]).squeeze(1)
        chosen = best(scores, attn.top_k)
        tokens = [t for j in chosen for t in range(j * attn.chunk_size, (j + 1) * attn.chunk_size)]
        reads.append(
            attend(at_edge[group], [keys[t][group, None] for t in tokens], [values[t][group, None] for t in tokens])
        )
    return torch.cat(reads)


def naive_fmka(attn: FastMemoryKeyedAttention, x: Tensor, positions: Tensor) -> Iterator[Tensor]:
    keys, values, means, index_keys = [], [], [], []
    session = Session(attn)
    for t, (x_t, position) in enumerate(zip(x, positions, strict=True)):
        q = attn.queries(x_t)
        m = session.add(x_t)
        if attn.top_k and (t + 1) % attn.chunk_size == 0:
            means.append(x[t + 1 - attn.chunk_size : t + 1].mean(0))
            index_keys.append(attn.index_k_proj(means[-1]))
        candidates = attn.num_candidates(t + 1)
        r = torch.zeros_like(x_t)
        u = attn.index_q_proj(x_t) if attn.top_k else x_t
        if candidates:
            scores = (torch.stack(index_keys[:candidates]) @ u[:, None]).squeeze(1)
            chosen = best(scores, attn.top_k)
            r = (scores[None, chosen].softmax(-1) @ torch.stack([means[j] for j in chosen])).squeeze(0)
        mix = route(attn, q, [True, m is not None, candidates > 0])
        f = mix[0] * x_t + mix[1] * (x_t * 0 if m is None else m) + mix[2] * r
        keys.append(place(attn.rotary, attn.keys(f), position))
        values.append(attn.values(f))
        first = window_start(attn, t + 1)
        yield attn.o_proj(attend(place(attn.rotary, q, position), keys[first:], values[first:]).flatten())


class Session:
    """The average of the specification, letter by letter: m = a m + (1 - a) x, read as m / (1 - a^n)."""

    def __init__(self, attn: MemoryAttention) -> None:
        self.level = attn.session
        self.m: Tensor | float = 0.0
        self.n = 0

    def add(self, x_t: Tensor) -> Tensor | None:
        if self.level is None:
            return None
        a = self.level.decay(x_t)
        self.m = a * self.m + (1 - a) * x_t
        self.n += 1
        return self.m / (1 - a**self.n)


def route(attn: MemoryAttention, q: Tensor, exists: list[bool]) -> Tensor:
    logits = attn.router.output(torch.nn.functional.silu(attn.router.hidden(q.flatten())))
    mix = logits.masked_fill(~torch.tensor(exists), -torch.inf).softmax(-1)
    local = torch.tensor([1.0, 0.0, 0.0], dtype=mix.dtype)
    return local + attn.router.gate * (mix - local)


def best(scores: Tensor, top_k: int) -> list[int]:
    """Indices of the largest scores; the earlier one wins a tie."""
    return sorted(range(len(scores)), key=lambda j: (-scores[j].item(), j))[:top_k]


def window_start(attn: CausalAttention, tokens: int) -> int:
    return 0 if attn.local_window is None else max(0, tokens - attn.local_window)


TWINS: dict[type[CausalAttention], Callable[..., Iterator[Tensor]]] = {
    GroupedQueryAttention: naive_gqa,
    MultiHeadLatentAttention: naive_mla,
    MemoryKeyedAttention: naive_mka,
    FastMemoryKeyedAttention: naive_fmka,
}
