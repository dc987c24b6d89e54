"""Routers as the page shows them: heat maps of their shares, and a passage with the level that served each token."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from statistics import fmean

from mka.observations import Routing
from mka.report.charts import label
from mka.report.runs import Run

LEVELS = ("L1", "L2", "L3")
NAMES = ("L1, the window", "L2, the session", "L3, retrieved chunks")
CELL_WIDTH, CELL_HEIGHT, LEFT, TOP, GAP = 16, 22, 56, 22, 18
PASSAGE_TOKENS = 320


@dataclass(frozen=True)
class Word:
    """A token of the passage: its text, the number of the level that served it most, where the shares of L1 and of L1
    and L2 end (per cent), and all in words."""

    text: str
    level: int
    ends: tuple[float, float]
    words: str


@dataclass(frozen=True)
class RouterView:
    """`table`: the mean shares and the entropy of each layer; `served`: share of tokens served most by each level."""

    name: str
    title: str
    seeds: str
    heat_map: str
    table: tuple[list[str], list[list[str]]]
    passage: list[Word]
    served: list[str]


def router_views(runs: Sequence[Run]) -> list[RouterView]:
    """One of each mechanism and variant that has a router; shares are means over seeds, the passage is of the first."""
    views = []
    for number, run in enumerate(runs):
        for name, arm in run.arms.items():
            routings = [routing for routing in run.routings if routing.name == name]
            if routings:
                views.append(view(f"router-{number}-{name}", label(run, arm, runs), routings))
    return views


def view(name: str, title: str, routings: Sequence[Routing]) -> RouterView:
    shares = [
        [[fmean(seeds) for seeds in zip(*cells, strict=True)] for cells in zip(*layers, strict=True)]
        for layers in zip(*(routing.shares for routing in routings), strict=True)
    ]
    entropy = [mean_entropy(seeds) for seeds in zip(*(routing.entropy for routing in routings), strict=True)]
    first = routings[0]
    tokens = list(zip(first.text, first.served, strict=True))[:PASSAGE_TOKENS]
    passage = [word(text, served) for text, served in tokens]
    most = [sum(one.level == level for one in passage) for level in range(len(LEVELS))]
    rows = [
        [str(layer), *(f"{fmean(piece[level] for piece in pieces):.3f}" for level in range(3)), entropy[layer]]
        for layer, pieces in enumerate(shares)
    ]
    numbers = ", ".join(str(routing.seed) for routing in routings)
    return RouterView(
        name=name,
        title=title,
        seeds=f"mean of seeds {numbers}" if len(routings) > 1 else f"seed {numbers}",
        heat_map=heat_map(name, title, shares, first.edges),
        table=(["Layer", *LEVELS, "Entropy"], rows),
        passage=passage,
        served=[f"{count / max(1, len(passage)):.0%}" for count in most],
    )


def mean_entropy(seeds: Sequence[float | None]) -> str:
    known = [value for value in seeds if value is not None]
    return f"{fmean(known):.3f}" if len(known) == len(seeds) else "no choice"


def word(text: str, served: Sequence[float]) -> Word:
    level = served.index(max(served))
    shares = ", ".join(f"{name} {share:.2f}" for name, share in zip(LEVELS, served, strict=True))
    ends = round(100 * served[0], 1), round(100 * (served[0] + served[1]), 1)
    return Word(text, level, ends, f"{text.strip() or 'space'}: {shares}")


def heat_map(name: str, title: str, shares: Sequence[Sequence[Sequence[float]]], edges: Sequence[int]) -> str:
    """An <svg> of three grids, one a level: layers down, pieces of the row across, the darker the larger the share."""
    layers, pieces = len(shares), len(edges) - 1
    grid = TOP + layers * CELL_HEIGHT + GAP
    width, height = LEFT + pieces * CELL_WIDTH + 8, grid * len(LEVELS) + 16
    parts = [
        f'<svg class="heat chart" role="img" tabindex="0" viewBox="0 0 {width} {height}" '
        f'aria-labelledby="{name}-title {name}-desc">',
        f'<title id="{name}-title">Router of {escape(title)}: shares by layer and position</title>',
        f'<desc id="{name}-desc">Three grids, one for each memory level; the table below has the means.</desc>',
    ]
    for level, heading in enumerate(NAMES):
        top = level * grid + TOP
        parts.append(f'<text class="label" x="{LEFT}" y="{top - 7}">{heading}</text>')
        for layer, row in enumerate(shares):
            y = top + layer * CELL_HEIGHT
            parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 15}" text-anchor="end">layer {layer}</text>')
            for piece, cell in enumerate(row):
                tokens = f"tokens {edges[piece]:,} to {edges[piece + 1] - 1:,}"
                words = escape(f"layer {layer}, {tokens}: {heading.partition(',')[0]} {cell[level]:.3f}")
                x = LEFT + piece * CELL_WIDTH
                parts.append(
                    f'<g class="point cell" data-words="{words}"><rect class="ground" x="{x}" y="{y}" '
                    f'width="{CELL_WIDTH - 1}" height="{CELL_HEIGHT - 1}"/><rect class="level{level}" x="{x}" y="{y}" '
                    f'width="{CELL_WIDTH - 1}" height="{CELL_HEIGHT - 1}" fill-opacity="{cell[level]:.3f}"/></g>'
                )
    for piece in (0, pieces // 2, pieces):
        x, anchor = LEFT + piece * CELL_WIDTH, "start" if piece == 0 else "end" if piece == pieces else "middle"
        text = f"{edges[piece]:,}"
        parts.append(f'<text class="tick" x="{x}" y="{height - 8}" text-anchor="{anchor}">{text}</text>')
    return "\n".join([*parts, "</svg>"])
