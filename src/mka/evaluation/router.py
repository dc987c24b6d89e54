"""What the router of mka and fmka does with its levels: which it uses, how far back
they reach.

shares      the mean weight of each level by layer, head and position, over the tokens
            at which more than one level exists: the router's lambda or, for joint mka,
            the level's share of the attention mass in the one softmax
entropy     of the weights averaged over heads, from 0 (one level alone) to 1 (an even
            mix of the levels that exist)
distance    tokens from a query back to the end of each chunk that it retrieves
constants   time constants -1 / ln(a) of the learned session averages, in tokens
knock-out   the loss without a level, whose share is divided among the others, minus the
            loss of the whole model
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mka.attention.grouped import MemoryAttention, Watched
from mka.errors import InputError, check_whole
from mka.evaluation.text import edges
from mka.memory.options import LEVELS
from mka.memory.search import Retrieved
from mka.models import evaluating, mechanisms, next_token_loss
from mka.record.intervals import Estimate, ratio
from mka.record.mechanisms import WITH_MEMORY, listed
from mka.record.results import COLLAPSED


@dataclass(frozen=True)
class LayerRouting:
    """What one layer does with its memories; the levels are L1, L2 and L3.

    Attributes:
        layer: the layer's number, from 0, among the layers with memories.
        shares: the mean weight of each level, over the tokens at which more than one
            level exists.
        entropy: from 0 (one level alone) to 1 (an even mix); None if no token has a
            choice.
        distance: tokens back to the retrieved chunks: the median and the 90 % quantile;
            empty if nothing was retrieved.
        time_constants: those of a learned session average, in tokens: the quantiles at
            10, 50 and 90 %; empty if none is learned.
        by_position: `shares` for ranges of positions (`edges`), by the beginning of the
            range.
        by_head: `shares` of each head; a single entry if all heads have the same mix.
    """

    layer: int
    shares: list[float]
    entropy: float | None
    distance: list[float]
    time_constants: list[float]
    by_position: dict[int, list[float]]
    by_head: list[list[float]]

    @property
    def collapsed_onto(self) -> str | None:
        """The level that has nearly all of the weight; None if several are used."""
        if self.entropy is None or self.entropy >= COLLAPSED:
            return None
        return LEVELS[int(np.argmax(self.shares))]


class Seen(NamedTuple):
    """What was observed in one layer.

    Attributes:
        by_head: the weight of each level for each head, (B, T, H or 1, M).
        exists: whether each level exists, bool (B, T, M).
        distance: tokens back to each retrieved chunk, (N,).
    """

    by_head: Tensor
    exists: Tensor
    distance: Tensor

    @property
    def weights(self) -> Tensor:
        """The weight of each level, the mean over heads: (B, T, M)."""
        return self.by_head.mean(2)


def layer_routings(model: Any, rows: Tensor, batch_size: int = 4) -> list[LayerRouting]:
    """What each layer with memories does with rows (R, T) of token ids.

    Raises InputError for a model without such layers.
    """
    check_rows(rows, batch_size)
    layers = layers_with_memories(model)
    observed = watch(model, layers, rows.split(batch_size))
    found = []
    for number, attn in enumerate(layers):
        found.append(layer_routing(number, attn, observed[number]))
    return found


def knock_outs(model: Any, rows: Tensor, batch_size: int = 4) -> Iterator[tuple[str, Estimate]]:
    """Each level's name, and how much the loss on rows (R, T + 1) rises without the
    level.

    The estimates are in nats per token. Raises InputError for a model without memories.
    """
    check_rows(rows, batch_size)
    layers = layers_with_memories(model)
    whole = row_losses(model, rows, batch_size)
    for level, name in enumerate(LEVELS):
        with changed(layers, "silent", [level] * len(layers)):
            without = row_losses(model, rows, batch_size)
        # Rows are equally long, so each counts the same; differences on the same rows
        # are paired.
        yield name, ratio(without - whole, np.ones(len(whole)))


def check_rows(rows: Any, batch_size: int) -> None:
    """Raise InputError unless there are rows (R, T) of token ids, and a batch."""
    check_whole("batch_size", batch_size, 1)
    if not isinstance(rows, Tensor) or rows.dim() != 2 or not rows.numel():
        shape = tuple(getattr(rows, "shape", ()))
        raise InputError(f"rows has the shape {shape}; give token ids (R, T), R at least 1")


def layers_with_memories(model: Any) -> list[MemoryAttention]:
    """The layers that have a router, at least one. Raises InputError if there is
    none."""
    if layers := routed_layers(model):
        return layers
    raise InputError(f"the model has no router; {listed(WITH_MEMORY, 'and')} have one")


def routed_layers(model: Any) -> list[MemoryAttention]:
    """The layers that have a router; empty for a model of another mechanism."""
    return [attn for attn in mechanisms(model) if isinstance(attn, MemoryAttention)]


def watch(model: Any, layers: list[MemoryAttention], batches: Sequence[Tensor]) -> list[Seen]:
    """What each layer does with all rows of all batches (B, T)."""
    by_batch = [observe(model, layers, batch) for batch in batches]
    found = []
    for number in range(len(layers)):
        seen = [layers_seen[number] for layers_seen in by_batch]
        found.append(
            Seen(
                torch.cat([each.by_head for each in seen]),
                torch.cat([each.exists for each in seen]),
                torch.cat([each.distance for each in seen]),
            )
        )
    return found


def routing_of(model: Any, batches: Sequence[Tensor], pieces: int = 16) -> dict[str, Any]:
    """What the router of mka or fmka does, as fields of `mka.record.results.Routing`.

    These are the edges of pieces of a row, the shares by layer and piece, the entropy
    by layer, and the shares of each token of the first row over all layers. batches:
    token ids, each (B, T).
    """
    layers = routed_layers(model)
    observed = watch(model, layers, batches)
    length = batches[0].shape[1]
    # A row shorter than the number of pieces would give some edges twice.
    bounds = np.unique(np.linspace(0, length, pieces + 1).round().astype(int)).tolist()
    shares, entropy = [], []
    for seen in observed:
        # Where only the window exists it has all of the weight, which says nothing of
        # the router.
        choice = seen.exists.sum(-1) > 1
        shares.append(
            [mean_shares(seen.weights[:, a:b], choice[:, a:b]) for a, b in pairwise(bounds)]
        )
        entropy.append(mean_entropy(seen, choice))
    served = torch.stack([seen.weights[0] for seen in observed]).mean(0)
    return {
        "edges": bounds,
        "shares": rounded(shares),
        "entropy": rounded(entropy),
        "served": rounded(served.tolist()),
    }


def rounded(values: Any) -> Any:
    """Nested lists of numbers, rounded to four decimals; None is kept."""
    if isinstance(values, list):
        return [rounded(value) for value in values]
    return None if values is None else round(values, 4)


def text_rows(documents: Sequence[str], tokenizer: Any, count: int, length: int) -> Tensor:
    """Token ids (count, length + 1) from the beginning of the documents, joined to one
    stream.

    Raises InputError if they hold too few tokens.
    """
    check_whole("rows", count, 1)
    check_whole("length", length, 2)
    ids: list[int] = []
    wanted = count * (length + 1)
    for text in documents:
        ids += tokenizer(text, add_special_tokens=False, verbose=False).input_ids
        # As in training: documents are joined with an end of text between them.
        ids.append(tokenizer.eos_token_id)
        if len(ids) >= wanted:
            return torch.tensor(ids[:wanted]).view(count, length + 1)
    raise InputError(
        f"rows is {count}; the text has {len(ids):,} tokens, but the rows need {wanted:,}: use "
        "fewer rows or a shorter length"
    )


@torch.no_grad()
def observe(model: Any, layers: list[MemoryAttention], ids: Tensor) -> list[Seen]:
    """What each layer's router and search do while the model reads token ids (B, T)."""
    found: list[list[Any]] = [[torch.empty(0), torch.empty(0), torch.empty(0)] for _ in layers]

    def note(number: int, attn: MemoryAttention, what: Watched | Retrieved) -> None:
        """Keep what a layer reports: its weights, or the chunks that it retrieved."""
        if isinstance(what, Watched):
            found[number][:2] = what.weights.float().cpu(), what.exists.cpu()
            return
        # Rows are read at once, without a cache, so a query's column is its position.
        t = torch.arange(what.chunk.shape[1], device=what.chunk.device)
        back = t.view(-1, 1, 1) - ((what.chunk + 1) * attn.chunk_size - 1)
        found[number][2] = back[what.found].float().cpu()

    notes = [partial(note, number, attn) for number, attn in enumerate(layers)]
    with changed(layers, "watcher", notes), evaluating(model):
        model(ids.to(model.device), use_cache=False)
    return [Seen(*each) for each in found]


def layer_routing(number: int, attn: MemoryAttention, seen: Seen) -> LayerRouting:
    """What one layer does, in numbers."""
    choice = seen.exists.sum(-1) > 1
    constants = torch.empty(0)
    if attn.session is not None and attn.session.fixed_decay is None:
        # a = exp(-1 / tau): the time constant of a decay, in tokens.
        constants = -1 / torch.sigmoid(attn.session.decay_logit.detach().double()).log()
    by_position = {
        begin: mean_shares(seen.weights[:, begin:end], choice[:, begin:end])
        for begin, end in edges(seen.weights.shape[1])
    }
    # A router gives all heads one mix, so that only joint mka has more than one entry
    # here.
    heads = seen.by_head.shape[2]
    return LayerRouting(
        layer=number,
        shares=mean_shares(seen.weights, choice),
        entropy=mean_entropy(seen, choice),
        distance=quantiles(seen.distance, 0.5, 0.9),
        time_constants=quantiles(constants, 0.1, 0.5, 0.9),
        by_position=by_position,
        by_head=[mean_shares(seen.by_head[:, :, head], choice) for head in range(heads)],
    )


def mean_entropy(seen: Seen, choice: Tensor) -> float | None:
    """The mean entropy of the weights, from 0 to 1; None if no token has a choice.

    choice: the tokens at which several levels exist, bool (B, T).
    """
    # Divided by the largest entropy possible, which depends on how many levels exist
    # there.
    weights, count = seen.weights[choice], seen.exists[choice].sum(-1)
    entropy = -(weights * weights.clamp(min=1e-12).log()).sum(-1) / count.log()
    return entropy.mean().item() if len(entropy) else None


def mean_shares(weights: Tensor, choice: Tensor) -> list[float]:
    """The mean weights (M,) over the tokens that have a choice; over all tokens if none
    has.

    weights: (B, T, M). choice: bool (B, T).
    """
    return weights[choice if choice.any() else torch.ones_like(choice)].mean(0).tolist()


def quantiles(x: Tensor, *shares: float) -> list[float]:
    """The quantiles of x (N,) at these shares, from 0 to 1; empty if x is."""
    return np.quantile(x.numpy(), shares).tolist() if len(x) else []


@torch.no_grad()
def row_losses(model: Any, rows: Tensor, batch_size: int) -> np.ndarray:
    """The mean loss (R,) of each row in rows (R, T + 1), in nats per token."""
    with evaluating(model):
        losses = [
            next_token_loss(model, batch.to(model.device), reduction="none").double().mean(1).cpu()
            for batch in rows.split(batch_size)
        ]
    return torch.cat(losses).numpy()


@contextmanager
def changed(layers: Sequence[MemoryAttention], name: str, values: Sequence[Any]) -> Iterator[None]:
    """Within the block, give an attribute of each layer another value; afterwards it is
    None."""
    try:
        for attn, value in zip(layers, values, strict=True):
            setattr(attn, name, value)
        yield
    finally:
        for attn in layers:
            setattr(attn, name, None)
