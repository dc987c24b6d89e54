"""Charts -> inline SVG, coloured by the page's style sheet: the same chart gives the same bytes.

+--------------------------+
| HEIGHT - TOP - BOTTOM    |   grid lines and numbers at round places; a data point is a <g class="point"> that
|            WIDTH - LEFT  |   carries its words, for the pointer, the keyboard and screen readers
+--------------------------+
"""

from collections.abc import Callable
from html import escape
from math import ceil, floor, isfinite, log

from mka.report.charts import Axis, Chart, Point, Series
from mka.report.style import compact

WIDTH, HEIGHT = 640, 360
LEFT, RIGHT, TOP, BOTTOM = 80, 16, 14, 54
TICKS = 5
MARKERS = {
    "mha": "M-5,0a5,5 0 1,0 10,0a5,5 0 1,0 -10,0Z",
    "mqa": "M-5,-4.5H5L0,5Z",
    "gqa": "M-4.5,-4.5H4.5V4.5H-4.5Z",
    "mla": "M0,-6L6,0L0,6L-6,0Z",
    "mka": "M-5.5,4.5H5.5L0,-5.5Z",
    "fmka": "M-2,-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z",
}
"""Paths about the middle of a point; they differ as colours do, for those who cannot tell these apart."""
DASHES = ("none", "6 3", "2 3", "8 3 2 3", "1 5")

Scale = Callable[[float], float]


def draw(chart: Chart) -> str:
    """A complete <svg>, named by its title and description."""
    xs = [x for series in chart.series for x, _ in [*places(series), *series.line]]
    ys = [y for series in chart.series for y in heights(series)]
    x_range, y_range = span(chart.x, xs), span(chart.y, ys)
    across, up = scale(chart.x, x_range, LEFT, WIDTH - RIGHT), scale(chart.y, y_range, HEIGHT - BOTTOM, TOP)
    inside = f"{chart.name}-inside"
    parts = [
        f'<svg class="chart" role="img" tabindex="0" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'aria-labelledby="{chart.name}-title {chart.name}-desc">',
        f'<title id="{chart.name}-title">{escape(chart.title)}</title>',
        f'<desc id="{chart.name}-desc">{escape(description(chart))}</desc>',
        f'<clipPath id="{inside}"><rect x="{LEFT - 8}" y="{TOP - 8}" width="{WIDTH - LEFT - RIGHT + 16}" '
        f'height="{HEIGHT - TOP - BOTTOM + 16}"/></clipPath>',
        *axes(chart, across, up, x_range, y_range),
        f'<g clip-path="url(#{inside})">',
        *[line(series, across, up) for series in chart.series if series.line],
        *[dot(series, point, across, up) for series in chart.series for point in series.points],
        "</g></svg>",
    ]
    return "\n".join(parts)


def description(chart: Chart) -> str:
    return f"{chart.y.label} against {chart.x.label} of {', '.join(s.label for s in chart.series)}; {chart.how}."


def places(series: Series) -> list[tuple[float, float]]:
    return [(point.x, point.y) for point in series.points]


def heights(series: Series) -> list[float]:
    bars = [end for point in series.points for end in (point.low, point.high) if end is not None]
    return [y for _, y in [*places(series), *series.line]] + [end for end in bars if isfinite(end)]


def span(axis: Axis, values: list[float]) -> tuple[float, float]:
    """What the axis covers: its limits, or all values with a margin; from 0 where x counts from there."""
    if axis.limits is not None:
        return axis.limits
    values = [value for value in values if value > 0] if axis.log else values
    low, high = min(values, default=1), max(values, default=2)
    if axis.log:
        margin = (high / low) ** 0.06 if high > low else 2
        return low / margin, high * margin
    margin = 0.06 * (high - low) or 0.5
    starts = min(low, 0) == 0 and low < 0.3 * high
    return (0 if starts else low - margin), high + margin


def scale(axis: Axis, covered: tuple[float, float], first: float, last: float) -> Scale:
    """Values to places on the page."""
    low, high = (log(value) for value in covered) if axis.log else covered

    def place(value: float) -> float:
        return first + ((log(value) if axis.log else value) - low) / (high - low) * (last - first)

    return place


def ticks(axis: Axis, covered: tuple[float, float]) -> list[float]:
    """Round numbers inside: powers on a logarithmic axis, otherwise steps of 1, 2 or 5 times a power of ten."""
    low, high = covered
    if axis.log:
        first, last = ceil(log(low, axis.log) - 1e-9), floor(log(high, axis.log) + 1e-9)
        every = max(1, ceil((last - first + 1) / (TICKS + 3)))
        powers = [float(axis.log) ** power for power in range(first, last + 1, every)]
        if len(powers) > 1:
            return powers
    rough = (high - low) / TICKS
    power = 10.0 ** floor(log(rough, 10))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [number * step for number in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    return compact(float(f"{value:.6g}")) if abs(value) >= 10_000 else f"{value:g}"


def axes(
    chart: Chart, across: Scale, up: Scale, x_range: tuple[float, float], y_range: tuple[float, float]
) -> list[str]:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = [f'<line class="axis" x1="{LEFT}" y1="{bottom}" x2="{right}" y2="{bottom}"/>']
    for value in ticks(chart.y, y_range):
        y = up(value)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{number(value)}</text>')
    for value in ticks(chart.x, x_range):
        parts.append(
            f'<text class="tick" x="{across(value):.1f}" y="{bottom + 20}" text-anchor="middle">{number(value)}</text>'
        )
    middle = (TOP + bottom) / 2
    scaled = ", log scale" if chart.x.log else ""
    parts.append(
        f'<text class="label" x="{(LEFT + right) / 2}" y="{HEIGHT - 8}" text-anchor="middle">'
        f"{escape(chart.x.label)}{scaled}</text>"
    )
    scaled = ", log scale" if chart.y.log else ""
    parts.append(
        f'<text class="label" transform="translate(18 {middle}) rotate(-90)" text-anchor="middle">'
        f"{escape(chart.y.label)}{scaled}</text>"
    )
    return parts


def line(series: Series, across: Scale, up: Scale) -> str:
    path = " ".join(f"{across(x):.1f},{up(y):.1f}" for x, y in series.line)
    return f'<polyline class="line {series.kind}" stroke-dasharray="{dashes(series)}" points="{path}"/>'


def dashes(series: Series) -> str:
    return DASHES[series.look % len(DASHES)]


def dot(series: Series, point: Point, across: Scale, up: Scale) -> str:
    x, words = across(point.x), escape(point.words)
    bar = ""
    if point.low is not None and point.high is not None and isfinite(point.high - point.low):
        bar = f'<line class="bar" x1="{x:.1f}" y1="{up(point.low):.1f}" x2="{x:.1f}" y2="{up(point.high):.1f}"/>'
    shape = f'<path transform="translate({x:.1f} {up(point.y):.1f})" d="{MARKERS[series.kind]}"/>'
    hollow = " hollow" if series.look else ""
    return f'<g class="point {series.kind}{hollow}" data-words="{words}">{bar}{shape}</g>'


def swatch(series: Series) -> str:
    """The marker and the dashes of a series, for a legend."""
    hollow = " hollow" if series.look else ""
    return (
        '<svg class="swatch" viewBox="0 0 34 14" aria-hidden="true">'
        f'<line class="line {series.kind}" stroke-dasharray="{dashes(series)}" x1="1" y1="7" x2="33" y2="7"/>'
        f'<g class="point {series.kind}{hollow}"><path transform="translate(17 7)" d="{MARKERS[series.kind]}"/></g>'
        "</svg>"
    )
