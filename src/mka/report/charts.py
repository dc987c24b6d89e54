"""What the page's charts show: points with their words, apart from how they are drawn.

loss_charts    train and held-out loss against tokens, and against time
quality_charts held-out perplexity against cache bytes
cost_charts    time, and bytes of the state, against the length of a row
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal, NamedTuple

from mka.memory.options import LEVELS
from mka.record.results import CurvePoint
from mka.report.runs import ArmKey, Run, cut, smooth
from mka.report.summary import compact, shown_name

LINE_POINTS = 120
"""Points of a drawn train loss: more cannot be told apart."""


class Point(NamedTuple):
    """`words` is what is shown of it; low and high are the ends of its bar."""

    x: float
    y: float
    words: str
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """`look` counts the dashes: the variants of a mechanism, and the runs, differ in
    it."""

    label: str
    kind: str
    look: int
    points: list[Point]
    line: list[tuple[float, float]]


@dataclass(frozen=True)
class Axis:
    label: str
    log: Literal[0, 2, 10] = 0
    limits: tuple[float, float] | None = None


@dataclass(frozen=True)
class Chart:
    """`table` has the same numbers: headings, then rows. `is_named`: the series'
    labels are beside their points as well."""

    name: str
    title: str
    how: str
    x: Axis
    y: Axis
    series: list[Series]
    table: tuple[list[str], list[list[str]]]
    is_named: bool = False


@dataclass(frozen=True)
class HeatMap:
    """Shares of the memory levels, [layer][piece][level]; piece i is tokens edges[i] to
    edges[i + 1]."""

    name: str
    title: str
    how: str
    shares: Sequence[Sequence[Sequence[float]]]
    edges: Sequence[int]

    @property
    def num_layers(self) -> int:
        """The rows of each grid."""
        return len(self.shares)

    def cells(self, level: int) -> Iterator[tuple[int, int, float, str]]:
        """Layer, piece, share and words of each cell of a level's grid."""
        for layer, pieces in enumerate(self.shares):
            for piece, shares in enumerate(pieces):
                tokens = f"tokens {self.edges[piece]:,} to {self.edges[piece + 1] - 1:,}"
                share = shares[level]
                words = f"layer {layer}, {tokens}: {LEVELS[level]} {share:.3f}"
                yield layer, piece, share, words


def drawable(runs: Sequence[Run]) -> Iterator[tuple[Run, ArmKey, str, int]]:
    """Every mechanism and variant of every run: its label, and the number of its look
    among those of its kind."""
    seen: dict[str, int] = {}
    for run in runs:
        for arm in run.arms.values():
            look = seen.setdefault(arm[0], 0)
            seen[arm[0]] += 1
            yield run, arm, label(run, arm, runs), look


def seeds_note(runs: Sequence[Run]) -> str:
    """How many seeds a mean is over, where there are several."""
    counts = {summary.num_seeds for run in runs for summary in run.summaries}
    return f"; mean of {max(counts)} seeds" if counts == {max(counts)} and max(counts) > 1 else ""


def label(run: Run, arm: ArmKey, runs: Sequence[Run]) -> str:
    """The name of a series: the mechanism's, and the run's where there are several."""
    return shown_name(*arm) + (f" · {run.name}" if len(runs) > 1 else "")


def loss_charts(runs: Sequence[Run]) -> list[Chart]:
    """Nothing for runs without curves."""
    curves = [curve for run in runs for curve in run.curves.values() if curve]
    if not curves:
        return []
    limits = cut(curves)
    wheres: list[tuple[str, str, Callable[[CurvePoint], float]]] = [
        ("tokens", "tokens trained on", lambda point: point.tokens),
        ("time", "training time (s)", lambda point: point.seconds),
    ]
    return [loss_chart(runs, name, axis, place, limits) for name, axis, place in wheres]


def loss_chart(
    runs: Sequence[Run],
    name: str,
    axis: str,
    place: Callable[[CurvePoint], float],
    limits: tuple[float, float],
) -> Chart:
    """Held-out and train loss of every mechanism; `place` gives the x of a point,
    `limits` those of y."""
    series: list[Series] = []
    shown: dict[str, dict[int, str]] = {}
    for run, arm, text, look in drawable(runs):
        curve = run.curves[arm]
        looks = [(place(point), point.eval_loss) for point in curve if point.eval_loss is not None]
        time = [f" ({point.seconds:.1f} s)" if name == "time" else "" for point in curve]
        seen = zip(curve, time, strict=True)
        shown[text] = {
            point.tokens: f"{point.eval_loss:.4f}{at}"
            for point, at in seen
            if point.eval_loss is not None
        }
        train = [
            (place(point), point.train_loss) for point in curve if point.train_loss is not None
        ]
        smoothed = smooth([y for _, y in train])
        line = [(x, y) for (x, _), y in zip(train, smoothed, strict=True)]
        points = [
            Point(x, y, f"{text}: held-out {y:.4f} at {compact(round(x))} {unit(axis)}")
            for x, y in looks
        ]
        series.append(Series(text, arm[0], look, points, thinned(line)))
    columns = sorted({tokens for cells in shown.values() for tokens in cells})
    headings = ["Held-out loss at tokens", *map(compact, columns)]
    rows = [[text, *(cells.get(tokens, "") for tokens in columns)] for text, cells in shown.items()]
    return Chart(
        name=f"loss-{name}",
        title=f"Loss against {'tokens' if name == 'tokens' else 'training time'}",
        how="points: held-out; lines: train, smoothed; the first steps may lie above"
        + seeds_note(runs),
        x=Axis(axis),
        y=Axis("loss (nats per token)", limits=limits),
        series=series,
        table=(headings, rows),
    )


def unit(axis: str) -> str:
    """What the numbers of an x axis count."""
    return "tokens" if axis.startswith("tokens") else "s"


def thinned(line: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Every n-th point of a line, and its last one: at most about LINE_POINTS."""
    step = max(1, -(-len(line) // LINE_POINTS))
    return [*line[::step], *line[-1:]] if line else []


def quality_charts(runs: Sequence[Run]) -> list[Chart]:
    """Held-out perplexity against cache bytes per token; nothing where none is
    finite."""
    """Held-out perplexity against cache bytes per token, with one standard deviation
    over seeds."""
    series, rows = [], []
    of = {(run.name, s.attention_type, s.variant): s for run in runs for s in run.summaries}
    for run, arm, text, look in drawable(runs):
        summary = of[(run.name, *arm)]
        x, y, spread = (
            summary.cache_bytes_per_token,
            summary.perplexity.value,
            summary.perplexity.spread,
        )
        shown = f"{y:.2f}" + (f" ± {spread:.2f}" if spread is not None else "")
        bar = (y - spread, y + spread) if spread is not None else (None, None)
        point = Point(x, y, f"{text}: perplexity {shown}, {x:,.0f} bytes of cache per token", *bar)
        series.append(Series(text, arm[0], look, [point] if isfinite(y) else [], []))
        rows.append([text, f"{x:,.0f}", shown])
    chart = Chart(
        name="perplexity-cache",
        title="Quality against the size of the cache",
        how=f"lower left is better; bars: one standard deviation over seeds{seeds_note(runs)}",
        x=Axis("cache per token (bytes, bfloat16)", log=2),
        y=Axis("held-out perplexity (per token)"),
        series=series,
        table=(["Mechanism", "Cache B/token", "Perplexity"], rows),
        is_named=True,
    )
    return [chart] if any(one.points for one in series) else []


def cost_charts(runs: Sequence[Run]) -> list[Chart]:
    """Nothing for runs without costs."""
    if not any(run.costs for run in runs):
        return []
    return [
        cost_chart(runs, "time", "Time against the length of a row", "forward pass (ms)", "ms"),
        cost_chart(runs, "memory", "Memory against the length of a row", "state (bytes)", "bytes"),
    ]


def cost_chart(runs: Sequence[Run], name: str, title: str, axis: str, unit: str) -> Chart:
    """Milliseconds ("time") or bytes ("memory") of one layer against the length of a
    row."""
    series, rows = [], []
    lengths = sorted({cost.tokens for run in runs for cost in run.costs})
    for run, arm, text, look in drawable(runs):
        mine = {c.tokens: c for c in run.costs if run.arms.get(c.name) == arm}
        values = {t: c.milliseconds if name == "time" else c.state_bytes for t, c in mine.items()}
        words = {
            t: f"{value:,.2f}" if name == "time" else f"{value:,}" for t, value in values.items()
        }
        points = [
            Point(t, y, f"{text}: {words[t]} {unit} at {t:,} tokens")
            for t, y in sorted(values.items())
        ]
        series.append(Series(text, arm[0], look, points, [(point.x, point.y) for point in points]))
        rows.append([text, *(words.get(t, "") for t in lengths)])
    return Chart(
        name=f"cost-{name}",
        title=title,
        how="one layer reads one row at once"
        if name == "time"
        else "what one layer keeps of one row, for decoding",
        x=Axis("tokens of the row", log=2),
        y=Axis(axis, log=10),
        series=series,
        table=([f"{unit} at tokens", *(f"{t:,}" for t in lengths)], rows),
    )
