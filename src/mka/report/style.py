"""How every figure looks, and how it is saved."""

import io
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mka.report.runs import Arm
from mka.storage import write_atomically

# Okabe and Ito's palette, which most colour-blind readers tell apart; yellow is left out, too pale on white.
STYLES = {
    "mha": ("#000000", "o"),
    "mqa": ("#56B4E9", "v"),
    "gqa": ("#009E73", "s"),
    "mla": ("#CC79A7", "D"),
    "mka": ("#D55E00", "^"),
    "fmka": ("#0072B2", "P"),
}
DASHES = ("solid", "dashed", "dotted", "dashdot")
"""The mechanism as it is, then its variants, which have hollow points."""


class Look(NamedTuple):
    colour: str
    marker: str
    dashes: str
    hollow: bool


def looks_of(arms: Iterable[Arm]) -> dict[Arm, Look]:
    """Mechanisms differ in colour and marker, the variants of one in their dashes."""
    looks: dict[Arm, Look] = {}
    for kind, variant in arms:
        before = sum(1 for other, name in looks if other == kind and name)
        dashes = DASHES[1 + before % (len(DASHES) - 1)] if variant else DASHES[0]
        looks[kind, variant] = Look(*STYLES[kind], dashes, bool(variant))
    return looks


SETTINGS = {
    "svg.hashsalt": "mka",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "Arial"],
    "font.size": 10,
    "text.color": "#222222",
    "axes.labelcolor": "#222222",
    "axes.edgecolor": "#888888",
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.8,
    "axes.titlesize": 12,
    "axes.titlelocation": "left",
    "axes.titlepad": 24,
    "figure.facecolor": "white",
}
SIZE = (7.2, 4.2)


def save_svg(path: Path, draw: Callable[[], Figure]) -> Path:
    """Draw under SETTINGS and write the SVG atomically; no date and no version in it."""
    text = io.StringIO()
    with matplotlib.rc_context(settings()):
        draw().savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    write_atomically(path, text.getvalue())
    return path


def settings() -> dict[Any, Any]:
    """SETTINGS over matplotlib's own defaults, so that a user's matplotlibrc changes nothing."""
    return {**{key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}, **SETTINGS}


def empty_figure(width: float = 0.86) -> tuple[Figure, Axes]:
    """A figure and its axes, which take `width` of it."""
    figure = Figure(figsize=SIZE)
    axes = figure.add_axes((0.1, 0.14, width, 0.7))
    axes.tick_params(length=0)
    return figure, axes


def title(axes: Axes, what: str, how: str) -> None:
    """What is shown, and under it in grey how to read it."""
    axes.set_title(what)
    axes.annotate(how, (0, 1), (0, 7), xycoords="axes fraction", textcoords="offset points", color="#666666", size=9)


def compact(number: float) -> str:
    """1500 as 1.5k, 2000000 as 2M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:g}{letter}"
    return f"{number:g}"
