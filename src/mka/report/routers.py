"""Routers as the page shows them: heat maps of their shares, and a passage with the
level that served each token."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from mka.memory.options import LEVELS
from mka.record.results import Routing
from mka.report.charts import HeatMap, label
from mka.report.runs import Run

PASSAGE_TOKENS = 320


@dataclass(frozen=True)
class Word:
    """A token of the passage: its text, the number of the level that served it most,
    where the shares of L1 and of L1 and L2 end (per cent), and all in words."""

    text: str
    level: int
    ends: tuple[float, float]
    words: str


@dataclass(frozen=True)
class RouterView:
    """`table`: the mean shares and the entropy of each layer; `served`: share of tokens
    served most by each level."""

    name: str
    title: str
    seeds: str
    heat_map: HeatMap
    table: tuple[list[str], list[list[str]]]
    passage: list[Word]
    served: list[str]


def router_views(runs: Sequence[Run]) -> list[RouterView]:
    """One of each mechanism and variant that has a router; shares are means over seeds,
    the passage is of the first."""
    views = []
    for number, run in enumerate(runs):
        for name, arm in run.arms.items():
            routings = [routing for routing in run.routings if routing.name == name]
            if routings:
                views.append(view(f"router-{number}-{name}", label(run, arm, runs), routings))
    return views


def view(name: str, title: str, routings: Sequence[Routing]) -> RouterView:
    """What the page shows of one mechanism's router, from the routings of its seeds."""
    shares = [
        [
            [fmean(seeds) for seeds in zip(*cells, strict=True)]
            for cells in zip(*layers, strict=True)
        ]
        for layers in zip(*(routing.shares for routing in routings), strict=True)
    ]
    entropy = [
        mean_entropy(seeds)
        for seeds in zip(*(routing.entropy for routing in routings), strict=True)
    ]
    first = routings[0]
    tokens = list(zip(first.text, first.served, strict=True))[:PASSAGE_TOKENS]
    passage = [word(text, served) for text, served in tokens]
    most = [sum(one.level == level for one in passage) for level in range(len(LEVELS))]
    rows = [
        [
            str(layer),
            *(f"{fmean(piece[level] for piece in pieces):.3f}" for level in range(3)),
            entropy[layer],
        ]
        for layer, pieces in enumerate(shares)
    ]
    numbers = ", ".join(str(routing.seed) for routing in routings)
    return RouterView(
        name=name,
        title=title,
        seeds=f"mean of seeds {numbers}" if len(routings) > 1 else f"seed {numbers}",
        heat_map=HeatMap(
            name, f"Router of {title}", "shares by layer and position", shares, first.edges
        ),
        table=(["Layer", *LEVELS, "Entropy"], rows),
        passage=passage,
        served=[f"{count / max(1, len(passage)):.0%}" for count in most],
    )


def mean_entropy(seeds: Sequence[float | None]) -> str:
    """The mean over seeds to three digits, or "no choice" where a seed had none."""
    known = [value for value in seeds if value is not None]
    return f"{fmean(known):.3f}" if len(known) == len(seeds) else "no choice"


def word(text: str, served: Sequence[float]) -> Word:
    """A token of the passage and the shares (of L1, L2, L3) that served it."""
    level = served.index(max(served))
    shares = ", ".join(f"{name} {share:.2f}" for name, share in zip(LEVELS, served, strict=True))
    ends = round(100 * served[0], 1), round(100 * (served[0] + served[1]), 1)
    return Word(text, level, ends, f"{text.strip() or 'space'}: {shares}")
