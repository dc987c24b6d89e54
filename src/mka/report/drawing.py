"""Charts -> Vega-Lite specifications -> SVG, drawn by vl-convert.

One specification serves the files in a run's folder and the page. They differ in colors
alone: the files have those of the table on white; in the page every color is a custom
property of its style sheet, so that dark mode, print and the page's own hover follow.
The same chart gives the same bytes.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

from mka.memory.options import LEVEL_TITLES
from mka.record.mechanisms import MECHANISMS
from mka.report.charts import Axis, Chart, HeatMap, Series

WIDTH, HEIGHT = 560, 300
CELL_WIDTH, CELL_HEIGHT = 16, 20
FONT = "Liberation Sans, Arial, Helvetica, sans-serif"
SCHEMA = "https://vega.github.io/schema/vega-lite/v6.json"
VERSION: Literal["6.4"] = "6.4"
TAG = re.compile(r"<[^<>]*>")
CLIP = re.compile(r'(?<= id=")clip\d+(?=")|(?<=url\(#)clip\d+(?=\))')
PLACES = re.compile(r' (?:d|transform|x2|y2|width|height)="[^"]*"')
LONG = re.compile(r"-?\d+\.\d{3,}")
NUMBER = "format(datum.value, abs(datum.value) < 1 ? '~g' : '~s')"
"""0.3, 4.55 and 200k: d3's SI prefixes, without those that make 300m out of 0.3."""
CROWDED = "10 * domain('y')[0] < domain('y')[1] && !test(/^[125]/, format(datum.value, '.0e'))"
"""From a decade on, 1, 2 and 5 are the numbers of a logarithmic axis, or it may lack
its 10."""
DASHES = ([1, 0], [4, 2], [1.5, 2], [6, 2, 1.5, 2], [1.5, 4])
"""The mechanism as it is, then its variants and those of other runs, which have hollow
points. So short that the outline of a point shows them, which is how the legend has
them."""
TICKS = {
    2: {"tickCount": 5, "format": ",.0f"},  # a power of two is read whole
    10: {"tickCount": 3, "labelExpr": f"{CROWDED} ? '' : {NUMBER}"},
    0: {"tickCount": 5, "labelExpr": NUMBER},
}
"""How the numbers of an axis are written, by the base of its logarithm (0: none)."""


@dataclass(frozen=True)
class Palette:
    """The colors of a drawing: of text, soft text, rules, ground and of kinds and
    levels."""

    text: str
    soft: str
    rule: str
    ground: str
    kinds: dict[str, str]
    levels: tuple[str, str, str]


ON_WHITE = Palette(
    text="#222222",
    soft="#5c5c66",
    rule="#d9d9df",
    ground="#ffffff",
    kinds={kind: row.color for kind, row in MECHANISMS.items()},
    levels=("#0072b2", "#d98200", "#009e73"),
)
IN_PAGE = Palette(
    text="var(--text)",
    soft="var(--soft)",
    rule="var(--rule)",
    ground="var(--ground)",
    kinds={kind: f"var(--{kind})" for kind in MECHANISMS},
    levels=("var(--level0)", "var(--level1)", "var(--level2)"),
)


def svg(specification: dict[str, Any], name: str, marks: Sequence[dict[str, Any]] = ()) -> str:
    """A complete <svg>, with marks that only Vega has. vl-convert is loaded here, where
    something is drawn."""
    import vl_convert

    vega = vl_convert.vegalite_to_vega(specification, vl_version=VERSION)
    text = vl_convert.vega_to_svg(vega | {"marks": [*vega["marks"], *marks]})
    # Vega counts its clip paths through all charts of a process: named after the chart,
    # they are the same in every process, and unique in a page.
    numbers = dict.fromkeys(CLIP.findall(text))
    names = {number: f"{name}-clip{count}" for count, number in enumerate(numbers)}
    text = CLIP.sub(lambda found: names[found[0]], text)
    # A hundredth of a pixel is enough, and halves the page. Words between tags stay.
    return TAG.sub(lambda tag: PLACES.sub(rounded, tag[0]), text)


def rounded(places: re.Match[str]) -> str:
    """An attribute with its numbers to two decimals."""
    return LONG.sub(lambda number: f"{float(number[0]):.2f}", places[0])


def drawn(chart: Chart | HeatMap, palette: Palette = IN_PAGE) -> str:
    """A chart or heat map as an <svg>."""
    if isinstance(chart, HeatMap):
        return svg(heat_map_of(chart, palette), chart.name)
    return svg(chart_of(chart, palette), chart.name, [names(palette)] if chart.is_named else [])


def chart_of(chart: Chart, palette: Palette) -> dict[str, Any]:
    """The specification of a chart: lines, bars of spread, points with their words."""
    labels = [series.label for series in chart.series]
    colors = [palette.kinds[series.kind] for series in chart.series]
    look = {
        "stroke": by_label(labels, colors),
        "fill": by_label(
            labels, [palette.ground if s.look else c for s, c in paired(chart, colors)]
        ),
        "shape": by_label(labels, [MECHANISMS[series.kind].marker for series in chart.series]),
        "strokeDash": by_label(labels, [DASHES[s.look % len(DASHES)] for s in chart.series]),
    }
    place = {"x": axis_of(chart.x, "x"), "y": axis_of(chart.y, "y")}
    lines = {
        "data": {"values": [row for series in chart.series for row in line_rows(series)]},
        "mark": {"type": "line", "clip": True, "strokeWidth": 1.2, "aria": False},
        "encoding": place
        | {"stroke": look["stroke"], "strokeDash": look["strokeDash"], "order": {"field": "x"}},
    }
    rows = [row for series in chart.series for row in point_rows(series, chart.y.limits)]
    bars = {
        "data": {"values": [row for row in rows if row["low"] is not None]},
        "mark": {"type": "rule", "strokeWidth": 1.4, "aria": False},
        "encoding": {
            "x": place["x"],
            "y": place["y"] | {"field": "low"},
            "y2": {"field": "high"},
            "stroke": look["stroke"],
        },
    }
    points = {
        "name": "points",
        "data": {"values": rows},
        "mark": {"type": "point", "size": 70, "opacity": 1, "strokeWidth": 1.6},
        "encoding": place | look | {"description": {"field": "words"}},
    }
    has_lines = any(series.line for series in chart.series)
    has_bars = any(row["low"] is not None for row in rows)
    layers = [*([lines] if has_lines else []), *([bars] if has_bars else []), points]
    return frame(chart.title, chart.how, palette) | {
        "width": WIDTH,
        "height": HEIGHT,
        "layer": layers,
    }


def names(palette: Palette) -> dict[str, Any]:
    """The labels of the series beside their points, none over another. One without room
    is left
    out: the legend has it."""
    corners = ["top-right", "bottom-right", "top-left", "bottom-left"]
    return {
        "type": "text",
        "from": {"data": "points_marks"},
        "encode": {
            "enter": {
                "text": {"field": "datum.label"},
                "font": {"value": FONT},
                "fill": {"value": palette.text},
                "fontSize": {"value": 12},
            }
        },
        "transform": [
            {
                "type": "label",
                "size": {"signal": "[width, height]"},
                "anchor": ["right", "left", *corners],
                "offset": [4, 8],
                "avoidBaseMark": False,  # would need a canvas, which vl-convert has not
            }
        ],
    }


def paired(chart: Chart, values: Sequence[str]) -> list[tuple[Series, str]]:
    """Each series with its value."""
    return [*zip(chart.series, values, strict=True)]


def by_label(labels: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    """A channel that has one value per series. Channels of one field share one
    legend."""
    return {
        "field": "label",
        "type": "nominal",
        "title": None,
        "scale": {"domain": [*labels], "range": [*values]},
    }


def axis_of(axis: Axis, name: str) -> dict[str, Any]:
    """A quantitative channel: logarithmic, cut at limits, or as wide as its values."""
    scale: dict[str, Any] = {"nice": False, "padding": 14}
    scale |= {"type": "log", "base": axis.log} if axis.log else {"zero": False}
    if axis.limits is not None:
        scale |= {"domain": [*axis.limits], "padding": 0}
    title = f"{axis.label}, log scale" if axis.log else axis.label
    ticks = {"title": title, "grid": name == "y", "labelSeparation": 6} | TICKS[axis.log]
    return {"field": name, "type": "quantitative", "scale": scale, "axis": ticks}


def line_rows(series: Series) -> list[dict[str, Any]]:
    """The drawn line of a series."""
    return [{"label": series.label, "x": x, "y": y} for x, y in series.line]


def point_rows(series: Series, limits: tuple[float, float] | None) -> list[dict[str, Any]]:
    """The points of a series between the limits, with their words and the ends of their
    bars (None: no bar)."""
    rows = []
    for point in series.points:
        if limits is not None and not limits[0] <= point.y <= limits[1]:
            continue  # not clipped: the keyboard would come to a mark that is not seen
        low, high = point.low, point.high
        has_bar = low is not None and high is not None and isfinite(high - low)
        rows.append(
            {
                "label": series.label,
                "x": point.x,
                "y": point.y,
                "words": point.words,
                "low": low if has_bar else None,
                "high": high if has_bar else None,
            }
        )
    return rows


def heat_map_of(heat: HeatMap, palette: Palette) -> dict[str, Any]:
    """Three grids, one per level: layers down, pieces of the row across, stronger for a
    larger share."""
    pieces = len(heat.edges) - 1
    ends = [f"{heat.edges[piece]:,}" for piece in range(pieces)]
    # An axis of pieces has room for three numbers: those of the first, the middle and
    # the last.
    marked = sorted({0, pieces // 2, pieces - 1})
    shown = " || ".join(f"datum.value == '{ends[piece]}'" for piece in marked)
    grids = []
    for level, title in enumerate(LEVEL_TITLES):
        rows = [
            {"layer": f"layer {layer}", "from": ends[piece], "share": share, "words": words}
            for layer, piece, share, words in heat.cells(level)
        ]
        grids.append(
            {
                "title": {"text": title, "anchor": "start", "fontSize": 12},
                "width": pieces * CELL_WIDTH,
                "height": heat.num_layers * CELL_HEIGHT,
                "data": {"values": rows},
                "mark": {"type": "rect", "fill": palette.levels[level], "stroke": palette.rule},
                "encoding": {
                    "x": {
                        "field": "from",
                        "type": "ordinal",
                        "sort": None,
                        "title": "from token" if level == len(LEVEL_TITLES) - 1 else None,
                        "axis": {"labelAngle": 0, "labelExpr": f"{shown} ? datum.label : ''"},
                    },
                    "y": {"field": "layer", "type": "ordinal", "sort": None, "title": None},
                    "fillOpacity": {
                        "field": "share",
                        "type": "quantitative",
                        "scale": {"domain": [0, 1], "range": [0, 1]},
                        "legend": None,
                    },
                    "description": {"field": "words"},
                },
            }
        )
    return frame(heat.title, heat.how, palette) | {"vconcat": grids}


def frame(title: str, how: str, palette: Palette) -> dict[str, Any]:
    """What all drawings have: title, text alternative, and quiet axes."""
    in_page = palette is IN_PAGE  # whose captions are text of the page
    shown = {} if in_page else {"title": {"text": title, "subtitle": how, "anchor": "start"}}
    soft = {"labelColor": palette.soft, "titleColor": palette.text}
    soft |= {"labelFontSize": 13, "titleFontSize": 13}
    return shown | {
        "$schema": SCHEMA,
        "description": f"{title}: {how}",
        "background": "transparent" if in_page else palette.ground,
        "config": {
            "font": FONT,
            "title": {"color": palette.text, "subtitleColor": palette.soft, "offset": 12},
            "axis": soft
            | {"domainColor": palette.soft, "gridColor": palette.rule, "ticks": False}
            | {"labelPadding": 6, "titlePadding": 10, "titleFontWeight": "normal"},
            "legend": soft
            | {"orient": "bottom", "columns": 4, "symbolStrokeWidth": 1.6, "labelLimit": 0}
            | {"columnPadding": 40},
            "view": {"stroke": None},
        },
    }
