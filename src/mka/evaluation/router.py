"""What the router of mka and fmka does with its levels: where it looks, which it needs, how far back they reach.

shares      mean lambda of each level, by layer and by position, over the tokens at which more than one level exists
entropy     of lambda, 1: an even mix of the levels that exist, 0: one level alone
distance    tokens from a query back to the end of the chunks that it retrieves
constants   -1 / ln(a) of the learned session averages, in tokens
knock-out   the loss with a level taken away (the router divides its share among the others), minus the whole model's
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.hooks import RemovableHandle

from mka.attention.fmka import FastMemoryKeyedAttention
from mka.attention.grouped import MemoryAttention
from mka.attention.mka import MemoryKeyedAttention
from mka.commands import RouterConfig
from mka.config import InputError, LongTermConfig
from mka.evaluation.text import chosen_documents, edges, shown
from mka.loading import load
from mka.memory.router import LOCAL
from mka.memory.search import search
from mka.models import CACHE_ARGUMENT, mechanisms, memory_cache, states
from mka.observations import COLLAPSED
from mka.statistics import ratio, verdict
from mka.storage import write_atomically

Say = Callable[[str], None]
LEVELS = ("L1", "L2", "L3")


class Seen(NamedTuple):
    """Of one layer: lambda and the levels that exist (B, T, M), tokens back to each chunk that was retrieved (N,)."""

    weights: Tensor
    exists: Tensor
    distance: Tensor


def score_router(config: RouterConfig, say: Say) -> None:
    """Print the tables. Raises InputError for a model without memories."""
    documents = chosen_documents(config)
    model, tokenizer = load(config.model)
    layers = routed_layers(model)
    if not layers:
        raise InputError(f"model is {config.model!r}; it has no router: mka and fmka have one")
    rows = text_rows(documents, tokenizer, config)
    batches = rows.split(config.batch_size)
    observed = watch(model, layers, [batch[:, :-1] for batch in batches])
    say(f"{len(rows)} rows of {config.length:,} tokens of {config.dataset}, {config.split} split")
    say(f"{'layer':<10} {'L1':>6} {'L2':>6} {'L3':>6} {'entropy':>9}   tokens back (median, 90 %)   time constants")
    found: list[dict[str, Any]] = []
    for number, (attn, seen) in enumerate(zip(layers, observed, strict=True)):
        row = layer_row(attn, seen)
        found.append({"layer": number} | row)
        far = ", ".join(f"{tokens:,.0f}" for tokens in row["distance"]) or "nothing retrieved"
        slow = ", ".join(f"{tokens:,.1f}" for tokens in row["time_constants"]) or "none learned"
        mixed = row["entropy"]
        shown = "no choice" if mixed is None else f"{mixed:.3f}"
        say(f"{number:<10} {levels(row['shares'])} {shown:>9}   {far:<26}   {slow}")
        if mixed is not None and mixed < COLLAPSED:
            say(f"warning: layer {number} has collapsed onto {LEVELS[int(np.argmax(row['shares']))]}")
    say(f"{'positions':<10} {'L1':>6} {'L2':>6} {'L3':>6}   mean of the layers")
    for begin, end in edges(config.length):
        say(f"{f'{begin}-{end - 1}':<10} {levels(np.mean([at(row, begin) for row in found], axis=0))}")
    knocked = knock_out(model, layers, batches, say)
    if config.output is not None:
        lines = {"model": config.model, "dataset": config.dataset, "layers": found, "knock_out": knocked}
        write_atomically(Path(config.output), json.dumps(lines) + "\n")


def routed_layers(model: Any) -> list[MemoryAttention]:
    """The layers that have a router; none in a model of another mechanism."""
    return [attn for attn in mechanisms(model) if isinstance(attn, MemoryAttention)]


def watch(model: Any, layers: list[MemoryAttention], batches: Sequence[Tensor]) -> list[Seen]:
    """What each layer does with all rows of all batches (B, T)."""
    observed = zip(*(observe(model, layers, batch) for batch in batches), strict=True)
    return [Seen(*(torch.cat(parts) for parts in zip(*seen, strict=True))) for seen in observed]


def routing_of(model: Any, batches: Sequence[Tensor], pieces: int = 16) -> dict[str, Any]:
    """Shares by layer and piece of a row, entropy by layer, and shares of each token of the first row over all layers,
    as `mka.observations.Routing` has them, of a model of mka or fmka."""
    layers = routed_layers(model)
    observed = watch(model, layers, batches)
    length = batches[0].shape[1]
    bounds = np.unique(np.linspace(0, length, pieces + 1).round().astype(int)).tolist()
    rows = [layer_row(attn, seen) for attn, seen in zip(layers, observed, strict=True)]
    choice = [seen.exists.sum(-1) > 1 for seen in observed]
    shares = [
        [mean_shares(seen.weights[:, a:b], some[:, a:b]) for a, b in pairwise(bounds)]
        for seen, some in zip(observed, choice, strict=True)
    ]
    served = torch.stack([seen.weights[0] for seen in observed]).mean(0)
    return {
        "edges": bounds,
        "shares": rounded(shares),
        "entropy": rounded([row["entropy"] for row in rows]),
        "served": rounded(served.tolist()),
    }


def rounded(values: Any) -> Any:
    """Nested lists of numbers to four decimals; None stays."""
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return None if values is None else round(values, 4)


def text_rows(documents: list[str], tokenizer: Any, config: RouterConfig) -> Tensor:
    """(rows, length + 1): the documents as one stream, from its beginning."""
    ids: list[int] = []
    wanted = config.rows * (config.length + 1)
    for text in documents:
        ids += [*tokenizer(text, add_special_tokens=False, verbose=False).input_ids, tokenizer.eos_token_id]
        if len(ids) >= wanted:
            return torch.tensor(ids[:wanted]).view(config.rows, config.length + 1)
    raise InputError(
        f"rows is {config.rows}; {len(ids):,} tokens do not fill {wanted:,}: fewer rows or a shorter length"
    )


@torch.no_grad()
def observe(model: Any, layers: list[MemoryAttention], ids: Tensor) -> list[Seen]:
    """What each layer's router and search do while the model reads (B, T) tokens."""
    routed: dict[int, tuple[Tensor, Tensor]] = {}
    queries: dict[int, Tensor] = {}

    def note(number: int, attn: MemoryAttention, add: Callable[[Any], None]) -> None:
        def router(_module: Any, inputs: tuple[Tensor, Tensor], weights: Tensor) -> None:
            routed[number] = weights.float().cpu(), inputs[1].expand(weights.shape).cpu()

        add(attn.router.register_forward_hook(router))
        if attn.top_k:
            add(watch_queries(attn, lambda q: queries.update({number: q})))

    with hooks() as add:
        for number, attn in enumerate(layers):
            note(number, attn, add)
        cache = memory_cache(model, LongTermConfig())
        model(ids.to(model.device), use_cache=True, **{CACHE_ARGUMENT: cache})
    found = []
    for number, (attn, state) in enumerate(zip(layers, states(cache), strict=True)):
        distance = torch.empty(0)
        if number in queries:  # a row within the window is never searched
            t = torch.arange(ids.shape[1], device=queries[number].device)
            chosen = search(queries[number], state, attn.index_store, t[None], attn.limits)
            back = t.view(-1, 1, 1) - ((chosen.chunk + 1) * attn.chunk_size - 1)
            distance = back[chosen.found].float().cpu()
        found.append(Seen(*routed[number], distance))
    return found


def watch_queries(attn: MemoryAttention, keep: Callable[[Tensor], None]) -> RemovableHandle:
    """Have `keep` called with the queries (B, T, G, E) by which `attn` searches its chunks; the hook can be removed."""
    if isinstance(attn, FastMemoryKeyedAttention):
        return attn.index_q_proj.register_forward_hook(lambda _module, _inputs, u: keep(u.unsqueeze(2)))
    index_queries = cast(MemoryKeyedAttention, attn).index_queries  # of what its router is given
    return attn.router.register_forward_hook(lambda _module, inputs, _weights: keep(index_queries(inputs[0])))


def layer_row(attn: MemoryAttention, seen: Seen) -> dict[str, Any]:
    choice = seen.exists.sum(-1) > 1
    weights, count = seen.weights[choice], seen.exists[choice].sum(-1)
    entropy = -(weights * weights.clamp(min=1e-12).log()).sum(-1) / count.log()
    constants = torch.empty(0)
    if attn.session is not None and attn.session.fixed_decay is None:
        constants = -1 / torch.sigmoid(attn.session.decay_logit.detach().double()).log()
    by_position = {
        begin: mean_shares(seen.weights[:, begin:end], choice[:, begin:end])
        for begin, end in edges(seen.weights.shape[1])
    }
    return {
        "shares": mean_shares(seen.weights, choice),
        "entropy": entropy.mean().item() if len(entropy) else None,
        "distance": quantiles(seen.distance, 0.5, 0.9),
        "time_constants": quantiles(constants, 0.1, 0.5, 0.9),
        "by_position": by_position,
    }


def mean_shares(weights: Tensor, choice: Tensor) -> list[float]:
    """The mean of (N, T, M) over the tokens that have a choice; over all of them where none has."""
    return weights[choice if choice.any() else torch.ones_like(choice)].mean(0).tolist()


def quantiles(x: Tensor, *shares: float) -> list[float]:
    return np.quantile(x.numpy(), shares).tolist() if len(x) else []


def at(row: dict[str, Any], begin: int) -> list[float]:
    return row["by_position"][begin]


def levels(shares: Any) -> str:
    return " ".join(f"{share:>6.3f}" for share in shares)


@torch.no_grad()
def knock_out(model: Any, layers: list[MemoryAttention], batches: Any, say: Say) -> dict[str, Any]:
    """The loss without each level, row by row against the whole model's."""
    whole, found = row_losses(model, batches), {}
    for level, name in enumerate(LEVELS):

        def take_away(_module: Any, inputs: tuple[Tensor, Tensor], level: int = level) -> tuple[Tensor, Tensor]:
            return without(level, *inputs)

        with hooks() as add:
            for attn in layers:
                add(attn.router.register_forward_pre_hook(take_away))
            difference = ratio(row_losses(model, batches) - whole, np.ones(len(whole)))
        say(f"without {name}: {shown(difference, signed=True)}  nats per token, {verdict(difference)}")
        found[name] = difference.record()
    return found


def without(level: int, q: Tensor, exists: Tensor) -> tuple[Tensor, Tensor]:
    """A token that has this level alone keeps it."""
    kept = exists.clone()
    kept[..., level] = False
    kept[..., LOCAL] |= ~kept.any(-1)
    return q, kept


def row_losses(model: Any, batches: Any) -> np.ndarray:
    """Nats per token of each row."""
    losses = []
    for batch in batches:
        ids = batch.to(model.device)
        logits = model(ids[:, :-1], use_cache=False).logits.float()
        losses.append(cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").double().mean(1).cpu())
    return torch.cat(losses).numpy()


@contextmanager
def hooks() -> Iterator[Callable[[Any], None]]:
    """Hooks that are given to it are removed at the end."""
    handles: list[Any] = []
    try:
        yield handles.append
    finally:
        for handle in handles:
            handle.remove()
