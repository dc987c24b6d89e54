"""How much of what full attention would read each search of chunks finds, and at what loss.

    python benchmarks/search.py --model SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/search.py --model ... --tokens 4096 --documents 8 --budgets 256 64
    python benchmarks/search.py --model ... --chunk_sizes 16 --budgets 256 --prompts 3   # passkeys

A pretrained model, converted to joint mka without training, reads documents; every search chooses
chunks of the same number of tokens in total. The oracle knows the attention mass that the heads of
a group have on each chunk, over the whole past, and takes the largest. Prints one line of JSON per
search with

    share   the mass on what the search chose, divided by the mass on what the oracle chose: the
            mean over tokens, layers and documents
    loss    nats per token over the last three quarters of each document

The searches, and what they choose chunks by:

    sum, unrotated     the score of the group's summed queries with the mean key, before any rotary
                       embedding
    sum                the same with rotary embedding, as queries and keys are read
    softmax            the softmax over chunks of the scores with the mean keys, as they are read,
                       summed over the group's heads: what mka proposes by
    bounds             as softmax, with the largest score that a key within a chunk's bounds could
                       have (Quest)
    mean and bounds    as softmax, with the mean of both scores
    mean and range     as softmax, with q . mean + |q| . (high - low) / 4 for a chunk's bounds: two
                       vectors per chunk
    mean and variance  as softmax, with q . mean + (q^2 . variance) / 2, the log-mean-exp of the
                       scores to second order
    halves             as softmax, with the log-sum-exp of the scores of the means of a chunk's two
                       halves
    beside the window  the mean keys, but by each chunk's share in one softmax together with window
                       and sinks
    means, then keys   of four times as many chunks, proposed by softmax: the log-sum-exp of the
                       scores of all their keys, in one softmax with window and sinks: mka's own
    keys alone         the same without window and sinks
    keys of twice      as "means, then keys", of twice as many chunks
    oracle             the true attention mass
"""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal
from unittest.mock import patch

import torch
import tyro
from torch import Tensor

from mka.attention.mka import MemoryKeyedAttention
from mka.memory.longterm import chunk_means
from mka.memory.search import (
    AsRead,
    Limits,
    Retrieved,
    kept,
    retrieve,
    retrieve_as_read,
    taken,
    top_by_place,
)
from mka.models import convert
from pretrained import Options as Texts
from pretrained import documents, load, losses, passkey

DESCRIBED = (
    *(
        "sum, unrotated",
        "sum",
        "softmax",
        "bounds",
        "mean and bounds",
        "mean and range",
        "mean and variance",
    ),
    *("halves", "beside the window", "means, then keys", "keys alone", "keys of twice", "oracle"),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    model: str
    """Folder of the pretrained model, or a .gguf file of a model family that transformers can
    read."""
    tokens: int = 2048
    """Tokens per document or prompt."""
    documents: int = 4
    """Number of documents."""
    local_window: int = 256
    """Tokens in the window."""
    chunk_sizes: tuple[int, ...] = (8, 16, 32)
    """Sizes of chunks to try, in tokens."""
    budgets: tuple[int, ...] = (256, 64)
    """Numbers of retrieved tokens to try."""
    searches: tuple[str, ...] = DESCRIBED
    """Searches to try, by the names above."""
    prompts: int = 0
    """Number of passkeys, each at depths 0.3 and 0.6, to ask for instead of measuring losses; a
    passkey is right if each digit is the likeliest one after those before it."""
    threads: int = 2
    """Number of CPU threads."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device to measure on: cpu or cuda."""


class Call:
    """The queries and keys of the attention that is searching, each (1, T, heads, D).

    raw: as projected. rotated: as they are read.
    """

    raw: tuple[Tensor, Tensor]
    rotated: tuple[Tensor, Tensor]


def by_scores(scores: Tensor, groups: int, limits: Limits) -> Retrieved:
    """The best chunks by scores (H, T, J): each head's softmax, summed over a group's heads."""
    # Copied, because `hide` writes into its argument.
    scores = scores.clone()
    end = limits.end(torch.arange(scores.shape[1], device=scores.device))
    limits.hide(scores, end)
    # Early tokens have no candidate at all, so their softmax is NaN.
    mass = scores.softmax(-1).nan_to_num().unflatten(0, (groups, -1)).sum(1)
    return by_mass(mass, limits)


def by_mass(mass: Tensor, limits: Limits) -> Retrieved:
    """The chunks with the largest mass (G, T, J), among the candidates of each token."""
    mass = mass.clone()
    limits.hide(mass, limits.end(torch.arange(mass.shape[1], device=mass.device)))
    return taken([kept(*top_by_place(mass[None], limits.top_k), limits.top_k)])


def attention_mass(call: Call, limits: Limits) -> Tensor:
    """The attention mass (G, T, J) of a group's heads on each chunk, over the whole past."""
    q, k = (x[0].float().transpose(0, 1) for x in call.rotated)
    # Head by head: (T, T) scores of all heads at once would not fit.
    groups, chunks = k.shape[0], k.shape[1] // limits.chunk_size
    parts = []
    for group in range(groups):
        total = q.new_zeros(q.shape[1], chunks)
        for head in q.unflatten(0, (groups, -1))[group]:
            scores = head @ k[group].T / math.sqrt(q.shape[-1])
            weights = scores.masked_fill(
                torch.ones_like(scores).triu(1).bool(), -torch.inf
            ).softmax(-1)
            # Sinks are read anyway, whatever is retrieved.
            weights[:, : limits.sinks] = 0
            total += weights[:, : chunks * limits.chunk_size].unflatten(1, (chunks, -1)).sum(-1)
        parts.append(total)
    return torch.stack(parts)


def head_scores(q: Tensor, keys: Tensor) -> Tensor:
    """The scores (H, T, J) of queries (T, H, D) with keys (J, G, D)."""
    grouped = q.float().transpose(0, 1).unflatten(0, (keys.shape[1], -1))
    scores = (grouped @ keys.float().permute(1, 2, 0).unsqueeze(1)).flatten(0, 1)
    return scores / math.sqrt(q.shape[-1])


def bounds(call: Call, limits: Limits) -> Tensor:
    """The largest scores (H, T, J) that keys within the bounds of each chunk could have."""
    q, k = call.rotated[0][0], call.rotated[1][0]
    chunks = k.shape[0] // limits.chunk_size
    parts = k[: chunks * limits.chunk_size].unflatten(0, (chunks, -1))
    low, high = parts.amin(1), parts.amax(1)
    # A positive component of q is largest with the upper bound, a negative one with the lower.
    return head_scores(q.clamp(min=0), high) + head_scores(q.clamp(max=0), low)


def means(call: Call, limits: Limits) -> Tensor:
    """The scores (H, T, J) with the mean key of each chunk."""
    keys = chunk_means(call.rotated[1], limits.chunk_size, limits.sinks)[0]
    return head_scores(call.rotated[0][0], keys)


def mean_and_range(call: Call, limits: Limits) -> Tensor:
    """The scores (H, T, J) with the mean key, raised by the range of each chunk's keys."""
    q, k = call.rotated[0][0], call.rotated[1][0]
    chunks = k.shape[0] // limits.chunk_size
    parts = k[: chunks * limits.chunk_size].unflatten(0, (chunks, -1))
    return means(call, limits) + head_scores(q.abs(), (parts.amax(1) - parts.amin(1)) / 4)


def mean_and_variance(call: Call, limits: Limits) -> Tensor:
    """The scores (H, T, J) with the mean key, raised by the variance of each chunk's keys."""
    q, k = call.rotated[0][0].float(), call.rotated[1][0].float()
    chunks = k.shape[0] // limits.chunk_size
    parts = k[: chunks * limits.chunk_size].unflatten(0, (chunks, -1))
    spread = head_scores(q.square(), parts.var(1, unbiased=False)) / math.sqrt(q.shape[-1])
    return means(call, limits) + spread / 2


def beside_window(scores: Tensor, call: Call, limits: Limits) -> Retrieved:
    """The best chunks by their share in one softmax with window and sinks.

    scores: (H, T, J), -inf for chunks that are not candidates.
    """
    groups, candidates = call.rotated[1].shape[2], scores.clone()
    limits.hide(candidates, limits.end(torch.arange(scores.shape[1], device=scores.device)))
    # The denominator of the joint softmax: all candidates together with window and sinks.
    total = torch.logaddexp(candidates.logsumexp(-1), window_sums(call, limits)).unsqueeze(-1)
    return by_mass((candidates - total).exp().unflatten(0, (groups, -1)).sum(1), limits)


def window_sums(call: Call, limits: Limits) -> Tensor:
    """The log-sum-exp (H, T) of the scores with all tokens of the window and the sinks."""
    q, k = call.rotated
    t = torch.arange(q.shape[1], device=q.device)
    # What a token sees without retrieval: its own past since the last candidate, and the sinks.
    seen = (t <= t[:, None]) & (
        (t >= limits.end(t)[:, None] * limits.chunk_size) | (t < limits.sinks)
    )
    return head_scores(q[0], k[0]).masked_fill(~seen, -torch.inf).logsumexp(-1)


def key_sums(call: Call, limits: Limits, proposed: Retrieved) -> Tensor:
    """The log-sum-exp (H, T, J) of the scores with each chunk's tokens, without the sinks.

    It is -inf for chunks that are not proposed.
    """
    q, k = call.rotated
    size, heads = limits.chunk_size, q.shape[2] // k.shape[2]
    chunks = k.shape[1] // size
    scores = head_scores(q[0], k[0, : chunks * size])
    scores[..., : limits.sinks] = -torch.inf
    sums = scores.unflatten(-1, (chunks, size)).logsumexp(-1)
    chosen, found = (x[0].transpose(0, 1) for x in proposed)
    # One more column takes the places in which nothing was found; it is cut off below.
    there = torch.zeros(
        chosen.shape[0], chosen.shape[1], chunks + 1, dtype=torch.bool, device=q.device
    )
    there.scatter_(2, chosen.masked_fill(~found, chunks), True)
    return sums.masked_fill(~there[..., :chunks].repeat_interleave(heads, 0), -torch.inf)


def by_keys(call: Call, limits: Limits, times: int, window: bool = True) -> Retrieved:
    """The best chunks by the scores of their keys, of `times` as many proposed by the means.

    window: whether a chunk's share is that in one softmax with window and sinks.
    """
    groups = call.rotated[1].shape[2]
    proposed = by_scores(means(call, limits), groups, limits._replace(top_k=times * limits.top_k))
    sums = key_sums(call, limits, proposed)
    return beside_window(sums, call, limits) if window else by_scores(sums, groups, limits)


def halves(call: Call, limits: Limits) -> Tensor:
    """The log-sum-exp (H, T, J) of the scores with the mean keys of each chunk's two halves."""
    half = chunk_means(call.rotated[1], limits.chunk_size // 2, limits.sinks)[0]
    scores = head_scores(call.rotated[0][0], half[: len(half) // 2 * 2])
    return scores.unflatten(-1, (-1, 2)).logsumexp(-1)


def summed(call: Call, limits: Limits, which: str) -> Retrieved:
    """The best chunks by the summed queries of a group; `which`: raw or rotated."""
    q, k = getattr(call, which)
    queries = q.unflatten(2, (k.shape[2], -1)).sum(3)
    return retrieve(queries, chunk_means(k, limits.chunk_size, limits.sinks), limits)


SEARCHES: dict[str, Callable[[Call, Limits], Retrieved]] = {
    "sum, unrotated": lambda call, limits: summed(call, limits, "raw"),
    "sum": lambda call, limits: summed(call, limits, "rotated"),
    "softmax": lambda call, limits: retrieve_as_read(
        AsRead(call.rotated[0], chunk_means(call.rotated[1], limits.chunk_size, limits.sinks)),
        None,
        None,
        limits,
    ),
    "bounds": lambda call, limits: by_scores(
        bounds(call, limits), call.rotated[1].shape[2], limits
    ),
    "mean and bounds": lambda call, limits: by_scores(
        (bounds(call, limits) + means(call, limits)) / 2, call.rotated[1].shape[2], limits
    ),
    "mean and range": lambda call, limits: by_scores(
        mean_and_range(call, limits), call.rotated[1].shape[2], limits
    ),
    "mean and variance": lambda call, limits: by_scores(
        mean_and_variance(call, limits), call.rotated[1].shape[2], limits
    ),
    "beside the window": lambda call, limits: beside_window(
        means(call, limits) + math.log(limits.chunk_size), call, limits
    ),
    "keys alone": lambda call, limits: by_keys(call, limits, 4, window=False),
    "means, then keys": lambda call, limits: by_keys(call, limits, 4),
    "keys of twice": lambda call, limits: by_keys(call, limits, 2),
    "halves": lambda call, limits: by_scores(
        halves(call, limits), call.rotated[1].shape[2], limits
    ),
    "oracle": lambda call, limits: by_mass(attention_mass(call, limits), limits),
}


def main(options: Options) -> None:
    """Measure each search with each budget and size of chunks."""
    torch.set_num_threads(options.threads)
    pretrained, tokenizer = load(options.model, options.device)
    # `documents` takes the options of the other benchmark, of which it needs the number alone.
    wanted = Texts(model=options.model, documents=options.documents)
    rows = list(documents("code", tokenizer, wanted, options.tokens))
    for budget in options.budgets:
        for chunk_size in options.chunk_sizes:
            choice: dict[str, Any] = {"chunk_size": chunk_size, "top_k": budget // chunk_size}
            model = convert(pretrained, "mka", local_window=options.local_window, **choice).eval()
            for name in options.searches:
                if options.prompts:
                    counts = passkeys(model, tokenizer, name, options)
                    print(json.dumps(choice | {"search": name} | counts), flush=True)
                    continue
                found = [measure(model, ids, name, options) for _, ids in rows]
                loss, share = (sum(each) / len(found) for each in zip(*found, strict=True))
                line = choice | {"search": name, "share": round(share, 4), "loss": round(loss, 4)}
                print(json.dumps(line), flush=True)


def passkeys(model: Any, tokenizer: Any, name: str, options: Options) -> dict[str, int]:
    """How many passkeys a model with that search finds, and how many there were."""
    right = []
    for number in range(options.prompts):
        for depth in (0.3, 0.6):
            ids, key = passkey(tokenizer, options.tokens, number, depth)
            right.append(answers(model, ids, key, tokenizer, name))
    return {"right": sum(right), "of": len(right)}


def answers(model: Any, ids: Tensor, key: str, tokenizer: Any, name: str) -> bool:
    """Whether a model with that search would write each digit of the key after the ids (1, T)."""
    # One pass over the question and the true digits shows what each digit's prediction is.
    digits = torch.tensor(tokenizer(key).input_ids, device=model.device)
    ids = ids.to(model.device)
    call, real = Call(), MemoryKeyedAttention.read_long_term

    def noting(attn: Any, raw: Any, rotated: Any, *rest: Any) -> Any:
        """Keep the queries and keys that the search below is about to be called for."""
        call.raw, call.rotated = raw, rotated
        return real(attn, raw, rotated, *rest)

    def search(
        _near: AsRead, _far: Any, _nearness: Any, limits: Limits, _asked: Any = None, **_: Any
    ) -> Retrieved:
        """Search as asked, instead of as mka does."""
        return SEARCHES[name](call, limits)

    with (
        torch.no_grad(),
        patch.object(MemoryKeyedAttention, "read_long_term", noting),
        patch("mka.attention.mka.retrieve_as_read", search),
        # All that is found here is read: mka must not choose among it once more.
        patch("mka.attention.mka.PROPOSED", 1),
    ):
        logits = model(
            torch.cat([ids, digits[None]], 1), use_cache=False, logits_to_keep=len(digits) + 1
        ).logits
    return bool((logits[0, :-1].argmax(-1) == digits).all())


def measure(model: Any, ids: Tensor, name: str, options: Options) -> tuple[float, float]:
    """The loss of a document with that search, and the share of the oracle's mass that it finds."""
    call, shares = Call(), []
    real = MemoryKeyedAttention.read_long_term

    def noting(attn: Any, raw: Any, rotated: Any, *rest: Any) -> Any:
        """Keep the queries and keys that the search below is about to be called for."""
        call.raw, call.rotated = raw, rotated
        return real(attn, raw, rotated, *rest)

    def search(
        _near: AsRead, _far: Any, _nearness: Any, limits: Limits, _asked: Any = None, **_: Any
    ) -> Retrieved:
        """Search as asked, and note how much of the oracle's mass it finds."""
        retrieved, mass = SEARCHES[name](call, limits), attention_mass(call, limits)
        best = by_mass(mass, limits)

        def found(chosen: Retrieved) -> Tensor:
            """The mass (G, T) on the chosen chunks."""
            chunks, there = chosen.chunk[0].transpose(0, 1), chosen.found[0].transpose(0, 1)
            return (mass.gather(2, chunks) * there).sum(-1)

        # Tokens with enough candidates; with fewer, every search takes all of them.
        some = best.found[0, :, 0, -1]
        if some.any():
            shares.append((found(retrieved)[:, some].sum() / found(best)[:, some].sum()).item())
        return retrieved

    with (
        patch.object(MemoryKeyedAttention, "read_long_term", noting),
        patch("mka.attention.mka.retrieve_as_read", search),
        # All that is found here is read: mka must not choose among it once more.
        patch("mka.attention.mka.PROPOSED", 1),
    ):
        loss = losses(model, ids)[max(options.local_window, ids.shape[1] // 4) :].mean().item()
    return loss, sum(shares) / len(shares)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
