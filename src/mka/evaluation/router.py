"""What the router of mka and fmka does with its levels: where it looks, which it needs, how far back they reach.

shares      mean weight of each level, by layer, by head and by position, over the tokens at which more than one level
            exists: the router's lambda, or of joint mka the attention mass that a level has in the one softmax
entropy     of the mean weights of the heads, 1: an even mix of the levels that exist, 0: one level alone
distance    tokens from a query back to the end of the chunks that it retrieves
constants   -1 / ln(a) of the learned session averages, in tokens
knock-out   the loss with a level taken away (its share is divided among the others), minus the whole model's
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from mka.attention.grouped import MemoryAttention, Watched
from mka.commands import RouterConfig
from mka.evaluation.text import chosen_documents, edges, shown
from mka.limits import InputError
from mka.loading import load
from mka.memory.search import Retrieved
from mka.models import mechanisms
from mka.observations import COLLAPSED
from mka.statistics import ratio, verdict
from mka.storage import write_atomically

Say = Callable[[str], None]
LEVELS = ("L1", "L2", "L3")


class Seen(NamedTuple):
    """Of one layer: the weight of each level for each head (B, T, H or 1, M), the levels that exist (B, T, M), tokens
    back to each chunk that was retrieved (N,)."""

    by_head: Tensor
    exists: Tensor
    distance: Tensor

    @property
    def weights(self) -> Tensor:
        """(B, T, M): the mean of the heads."""
        return self.by_head.mean(2)


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
        if len(row["by_head"]) > 1:
            say("  by head  " + "   ".join(levels(head).strip() for head in row["by_head"]))
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
    found: list[list[Any]] = [[torch.empty(0), torch.empty(0), torch.empty(0)] for _ in layers]

    def note(number: int, attn: MemoryAttention, what: Watched | Retrieved) -> None:
        if isinstance(what, Watched):
            found[number][:2] = what.weights.float().cpu(), what.exists.cpu()
            return
        t = torch.arange(what.chunk.shape[1], device=what.chunk.device)
        back = t.view(-1, 1, 1) - ((what.chunk + 1) * attn.chunk_size - 1)
        found[number][2] = back[what.found].float().cpu()

    with changed(layers, "watcher", [partial(note, number, attn) for number, attn in enumerate(layers)]):
        model(ids.to(model.device), use_cache=False)
    return [Seen(*each) for each in found]


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
        "by_head": [mean_shares(seen.by_head[:, :, head], choice) for head in range(seen.by_head.shape[2])],
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
        with changed(layers, "silent", [level] * len(layers)):
            difference = ratio(row_losses(model, batches) - whole, np.ones(len(whole)))
        say(f"without {name}: {shown(difference, signed=True)}  nats per token, {verdict(difference)}")
        found[name] = difference.record()
    return found


def row_losses(model: Any, batches: Any) -> np.ndarray:
    """Nats per token of each row."""
    losses = []
    for batch in batches:
        ids = batch.to(model.device)
        logits = model(ids[:, :-1], use_cache=False).logits.float()
        losses.append(cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none").double().mean(1).cpu())
    return torch.cat(losses).numpy()


@contextmanager
def changed(layers: Sequence[MemoryAttention], name: str, values: Sequence[Any]) -> Iterator[None]:
    """Inside, this attribute of each layer has another value."""
    try:
        for attn, value in zip(layers, values, strict=True):
            setattr(attn, name, value)
        yield
    finally:
        for attn in layers:
            setattr(attn, name, None)
