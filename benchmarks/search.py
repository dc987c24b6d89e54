"""How much of what full attention would read each search of chunks finds, and what that does to the loss.

    python benchmarks/search.py --model SmolLM2-135M-Instruct.Q4_1.gguf
    python benchmarks/search.py --model ... --tokens 4096 --documents 8 --budgets 256 64
    python benchmarks/search.py --model ... --chunk_sizes 16 --budgets 256 --prompts 3      # passkeys instead

A pretrained model, converted to joint mka without training, reads documents; every search chooses chunks of as many
tokens in all. The oracle knows the attention mass that the heads of a group have on each chunk, over the whole past,
and takes the largest. share: the mass on what a search chose, in parts of the mass on what the oracle chose, mean over
tokens, layers and documents; loss: nats per token over the last three quarters. A line of JSON for each search.

    sum, unrotated     the group's queries summed, against the mean key, before any rotary embedding
    sum                the same, queries and keys as they are read
    softmax            the sum over the group's heads of their softmax over chunks, as they are read: what mka
                       proposes by
    bounds             as softmax, by the largest score that a key within a chunk's bounds could have (Quest)
    mean and bounds    as softmax, by the mean of both scores
    mean and range     as softmax, q . mean + |q| . (high - low) / 4 for each chunk's bounds: two vectors a chunk
    mean and variance  as softmax, q . mean + (q^2 . variance) / 2, the log-mean-exp of scores to second order
    halves             as softmax, by the log-sum-exp of the scores of the means of a chunk's two halves
    beside the window  by the mean key, but the share of each chunk in one softmax with window and sinks
    means, then keys   softmax proposes four times as many chunks; of these, by the log-sum-exp of the scores of all
                       their keys, in one softmax with window and sinks: mka's own
    keys alone         the same without window and sinks
    keys of twice      the same as "means, then keys" of twice as many chunks
    oracle             by the true attention mass
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
from mka.memory.search import AsRead, Limits, Retrieved, kept, retrieve, retrieve_as_read, taken, top_by_place
from mka.models import convert
from pretrained import Options as Texts
from pretrained import documents, load, losses, passkey

DESCRIBED = (
    *("sum, unrotated", "sum", "softmax", "bounds", "mean and bounds", "mean and range", "mean and variance"),
    *("halves", "beside the window", "means, then keys", "keys alone", "keys of twice", "oracle"),
)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    model: str
    """A folder, or a .gguf file of transformers' families."""
    tokens: int = 2048
    documents: int = 4
    local_window: int = 256
    chunk_sizes: tuple[int, ...] = (8, 16, 32)
    budgets: tuple[int, ...] = (256, 64)
    """Tokens that are retrieved."""
    searches: tuple[str, ...] = DESCRIBED
    prompts: int = 0
    """Passkeys, at depths 0.3 and 0.6 each: in how many is every digit the likeliest, those before it given?"""
    threads: int = 2
    device: Literal["cpu", "cuda"] = "cpu"


class Call:
    """The queries and keys of the attention that is searching: as projected, and as they are read."""

    raw: tuple[Tensor, Tensor]
    rotated: tuple[Tensor, Tensor]


def by_scores(scores: Tensor, groups: int, limits: Limits) -> Retrieved:
    """scores (H, T, J) of one row: the sum over a group's heads of each head's softmax over the candidates."""
    scores = scores.clone()
    end = limits.end(torch.arange(scores.shape[1], device=scores.device))
    limits.hide(scores, end)
    mass = scores.softmax(-1).nan_to_num().unflatten(0, (groups, -1)).sum(1)
    return by_mass(mass, limits)


def by_mass(mass: Tensor, limits: Limits) -> Retrieved:
    """mass (G, T, J)."""
    mass = mass.clone()
    limits.hide(mass, limits.end(torch.arange(mass.shape[1], device=mass.device)))
    return taken([kept(*top_by_place(mass[None], limits.top_k), limits.top_k)])


def attention_mass(call: Call, limits: Limits) -> Tensor:
    """(G, T, J): what the heads of a group weigh each chunk with, in one softmax over the whole past."""
    q, k = (x[0].float().transpose(0, 1) for x in call.rotated)
    groups, chunks = k.shape[0], k.shape[1] // limits.chunk_size
    parts = []
    for group in range(groups):
        total = q.new_zeros(q.shape[1], chunks)
        for head in q.unflatten(0, (groups, -1))[group]:
            scores = head @ k[group].T / math.sqrt(q.shape[-1])
            weights = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf).softmax(-1)
            weights[:, : limits.sinks] = 0  # they are read anyway
            total += weights[:, : chunks * limits.chunk_size].unflatten(1, (chunks, -1)).sum(-1)
        parts.append(total)
    return torch.stack(parts)


def head_scores(q: Tensor, keys: Tensor) -> Tensor:
    """(H, T, J) of queries (T, H, D) and keys (J, G, D)."""
    grouped = q.float().transpose(0, 1).unflatten(0, (keys.shape[1], -1))
    return (grouped @ keys.float().permute(1, 2, 0).unsqueeze(1)).flatten(0, 1) / math.sqrt(q.shape[-1])


def bounds(call: Call, limits: Limits) -> Tensor:
    q, k = call.rotated[0][0], call.rotated[1][0]
    chunks = k.shape[0] // limits.chunk_size
    parts = k[: chunks * limits.chunk_size].unflatten(0, (chunks, -1))
    low, high = parts.amin(1), parts.amax(1)
    return head_scores(q.clamp(min=0), high) + head_scores(q.clamp(max=0), low)


def means(call: Call, limits: Limits) -> Tensor:
    return head_scores(call.rotated[0][0], chunk_means(call.rotated[1], limits.chunk_size, limits.sinks)[0])


def mean_and_range(call: Call, limits: Limits) -> Tensor:
    q, k = call.rotated[0][0], call.rotated[1][0]
    chunks = k.shape[0] // limits.chunk_size
    parts = k[: chunks * limits.chunk_size].unflatten(0, (chunks, -1))
    return means(call, limits) + head_scores(q.abs(), (parts.amax(1) - parts.amin(1)) / 4)


def mean_and_variance(call: Call, limits: Limits) -> Tensor:
    q, k = call.rotated[0][0].float(), call.rotated[1][0].float()
    chunks = k.shape[0] // limits.chunk_size
    parts = k[: chunks * limits.chunk_size].unflatten(0, (chunks, -1))
    spread = head_scores(q.square(), parts.var(1, unbiased=False)) / math.sqrt(q.shape[-1])
    return means(call, limits) + spread / 2


def beside_window(scores: Tensor, call: Call, limits: Limits) -> Retrieved:
    """By scores (H, T, J) of chunks, -inf of no candidate: the share of each in one softmax with window and sinks."""
    groups, candidates = call.rotated[1].shape[2], scores.clone()
    limits.hide(candidates, limits.end(torch.arange(scores.shape[1], device=scores.device)))
    total = torch.logaddexp(candidates.logsumexp(-1), window_sums(call, limits)).unsqueeze(-1)
    return by_mass((candidates - total).exp().unflatten(0, (groups, -1)).sum(1), limits)


def window_sums(call: Call, limits: Limits) -> Tensor:
    """(H, T): the log-sum-exp of the scores of all tokens that are no candidates."""
    q, k = call.rotated
    t = torch.arange(q.shape[1], device=q.device)
    seen = (t <= t[:, None]) & ((t >= limits.end(t)[:, None] * limits.chunk_size) | (t < limits.sinks))
    return head_scores(q[0], k[0]).masked_fill(~seen, -torch.inf).logsumexp(-1)


def key_sums(call: Call, limits: Limits, proposed: Retrieved) -> Tensor:
    """(H, T, J): the log-sum-exp of the scores of each chunk's tokens less the sinks; -inf of what is not proposed."""
    q, k = call.rotated
    size, heads = limits.chunk_size, q.shape[2] // k.shape[2]
    chunks = k.shape[1] // size
    scores = head_scores(q[0], k[0, : chunks * size])
    scores[..., : limits.sinks] = -torch.inf
    sums = scores.unflatten(-1, (chunks, size)).logsumexp(-1)
    chosen, found = (x[0].transpose(0, 1) for x in proposed)
    there = torch.zeros(chosen.shape[0], chosen.shape[1], chunks + 1, dtype=torch.bool, device=q.device)
    there.scatter_(2, chosen.masked_fill(~found, chunks), True)
    return sums.masked_fill(~there[..., :chunks].repeat_interleave(heads, 0), -torch.inf)


def by_keys(call: Call, limits: Limits, times: int, window: bool = True) -> Retrieved:
    """Of `times` as many chunks as are taken, proposed by the means."""
    groups = call.rotated[1].shape[2]
    proposed = by_scores(means(call, limits), groups, limits._replace(top_k=times * limits.top_k))
    sums = key_sums(call, limits, proposed)
    return beside_window(sums, call, limits) if window else by_scores(sums, groups, limits)


def halves(call: Call, limits: Limits) -> Tensor:
    half = chunk_means(call.rotated[1], limits.chunk_size // 2, limits.sinks)[0]
    scores = head_scores(call.rotated[0][0], half[: len(half) // 2 * 2])
    return scores.unflatten(-1, (-1, 2)).logsumexp(-1)


def summed(call: Call, limits: Limits, which: str) -> Retrieved:
    q, k = getattr(call, which)
    groups = k.shape[2]
    return retrieve(q.unflatten(2, (groups, -1)).sum(3), chunk_means(k, limits.chunk_size, limits.sinks), limits)


SEARCHES: dict[str, Callable[[Call, Limits], Retrieved]] = {
    "sum, unrotated": lambda call, limits: summed(call, limits, "raw"),
    "sum": lambda call, limits: summed(call, limits, "rotated"),
    "softmax": lambda call, limits: retrieve_as_read(
        AsRead(call.rotated[0], chunk_means(call.rotated[1], limits.chunk_size, limits.sinks)), None, None, limits
    ),
    "bounds": lambda call, limits: by_scores(bounds(call, limits), call.rotated[1].shape[2], limits),
    "mean and bounds": lambda call, limits: by_scores(
        (bounds(call, limits) + means(call, limits)) / 2, call.rotated[1].shape[2], limits
    ),
    "mean and range": lambda call, limits: by_scores(mean_and_range(call, limits), call.rotated[1].shape[2], limits),
    "mean and variance": lambda call, limits: by_scores(
        mean_and_variance(call, limits), call.rotated[1].shape[2], limits
    ),
    "beside the window": lambda call, limits: beside_window(
        means(call, limits) + math.log(limits.chunk_size), call, limits
    ),
    "keys alone": lambda call, limits: by_keys(call, limits, 4, window=False),
    "means, then keys": lambda call, limits: by_keys(call, limits, 4),
    "keys of twice": lambda call, limits: by_keys(call, limits, 2),
    "halves": lambda call, limits: by_scores(halves(call, limits), call.rotated[1].shape[2], limits),
    "oracle": lambda call, limits: by_mass(attention_mass(call, limits), limits),
}


def main(options: Options) -> None:
    torch.set_num_threads(options.threads)
    pretrained, tokenizer = load(options.model, options.device)
    wanted = Texts(model=options.model, documents=options.documents)
    rows = list(documents("code", tokenizer, wanted, options.tokens))
    for budget in options.budgets:
        for chunk_size in options.chunk_sizes:
            choice: dict[str, Any] = {"chunk_size": chunk_size, "top_k": budget // chunk_size}
            model = convert(pretrained, "mka", local_window=options.local_window, **choice).eval()
            for name in options.searches:
                if options.prompts:
                    print(json.dumps(choice | {"search": name} | passkeys(model, tokenizer, name, options)), flush=True)
                    continue
                found = [measure(model, ids, name, options) for _, ids in rows]
                loss, share = (sum(each) / len(found) for each in zip(*found, strict=True))
                line = choice | {"search": name, "share": round(share, 4), "loss": round(loss, 4)}
                print(json.dumps(line), flush=True)


def passkeys(model: Any, tokenizer: Any, name: str, options: Options) -> dict[str, int]:
    asked = [(number, depth) for number in range(options.prompts) for depth in (0.3, 0.6)]
    right = [answers(model, *passkey(tokenizer, options.tokens, *each), tokenizer, name) for each in asked]
    return {"right": sum(right), "of": len(right)}


def answers(model: Any, ids: Tensor, key: str, tokenizer: Any, name: str) -> bool:
    """Whether a model with that search would say every digit of the key after the question ids (1, T)."""
    digits = torch.tensor(tokenizer(key).input_ids, device=model.device)
    ids = ids.to(model.device)
    call, real = Call(), MemoryKeyedAttention.read_long_term

    def noting(attn: Any, raw: Any, rotated: Any, *rest: Any) -> Any:
        call.raw, call.rotated = raw, rotated
        return real(attn, raw, rotated, *rest)

    def search(_near: AsRead, _far: Any, _nearness: Any, limits: Limits, _asked: Any = None, **_: Any) -> Retrieved:
        return SEARCHES[name](call, limits)

    with (
        torch.no_grad(),
        patch.object(MemoryKeyedAttention, "read_long_term", noting),
        patch("mka.attention.mka.retrieve_as_read", search),
        patch("mka.attention.mka.PROPOSED", 1),  # what is found here is read
    ):
        logits = model(torch.cat([ids, digits[None]], 1), use_cache=False, logits_to_keep=len(digits) + 1).logits
    return bool((logits[0, :-1].argmax(-1) == digits).all())


def measure(model: Any, ids: Tensor, name: str, options: Options) -> tuple[float, float]:
    """The loss of a document, and the share of the oracle's mass that the search finds."""
    call, shares = Call(), []
    real = MemoryKeyedAttention.read_long_term

    def noting(attn: Any, raw: Any, rotated: Any, *rest: Any) -> Any:
        call.raw, call.rotated = raw, rotated
        return real(attn, raw, rotated, *rest)

    def search(_near: AsRead, _far: Any, _nearness: Any, limits: Limits, _asked: Any = None, **_: Any) -> Retrieved:
        retrieved, mass = SEARCHES[name](call, limits), attention_mass(call, limits)
        best = by_mass(mass, limits)

        def found(chosen: Retrieved) -> Tensor:
            return (mass.gather(2, chosen.chunk[0].transpose(0, 1)) * chosen.found[0].transpose(0, 1)).sum(-1)

        some = best.found[0, :, 0, -1]  # tokens that have more candidates than are taken
        if some.any():
            shares.append((found(retrieved)[:, some].sum() / found(best)[:, some].sum()).item())
        return retrieved

    with (
        patch.object(MemoryKeyedAttention, "read_long_term", noting),
        patch("mka.attention.mka.retrieve_as_read", search),
        patch("mka.attention.mka.PROPOSED", 1),  # what is found here is read
    ):
        loss = losses(model, ids)[max(options.local_window, ids.shape[1] // 4) :].mean().item()
    return loss, sum(shares) / len(shares)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
