"""Names beside points, none over another name, a point or a bar."""

from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.text import Annotation, Text
from matplotlib.transforms import Bbox

from mka.report.summary import Mean

MARKER = 6.0
"""Half the room that a point takes, in typographic points."""
PLACES = [
    (dx * reach, dy * reach)
    for reach in (1, 2, 3, 4, 6, 8)
    for dx, dy in ((9, 0), (-9, 0), (7, 8), (-7, 8), (7, -8), (-7, -8), (0, 11), (0, -11))
]
"""Offsets from the point to the near edge of its name, in typographic points, the best first."""
NEAR = 8
"""How many of them are so near that no line needs to lead there."""


def label_points(axes: Axes, figure: Figure, points: Sequence[tuple[str, float, Mean]]) -> None:
    """Write each name at its (x, mean of y), at the first place that is free; a line leads to a distant one."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # settles the limits of the axes, which the places depend on
    taken = [occupied(axes, figure, x, y) for _, x, y in points]
    for name, x, y in points:
        taken.append(place(axes, canvas.get_renderer(), name, (x, y.value), taken))


def place(axes: Axes, renderer: RendererAgg, name: str, point: tuple[float, float], taken: Sequence[Bbox]) -> Bbox:
    """Write one name and return the box it takes, in pixels."""
    label, box = write(axes, renderer, name, point, PLACES[0])
    for offset in PLACES[1:]:
        if is_free(box, axes.get_window_extent(renderer), taken):
            break
        label.remove()
        label, box = write(axes, renderer, name, point, offset)
    return box


def write(
    axes: Axes, renderer: RendererAgg, name: str, point: tuple[float, float], offset: tuple[float, float]
) -> tuple[Annotation, Bbox]:
    dx, dy = offset
    align: dict[str, Any] = {
        "ha": "center" if dx == 0 else "left" if dx > 0 else "right",
        "va": "center" if dy == 0 else "bottom" if dy > 0 else "top",
    }
    leader = {"arrowstyle": "-", "color": "#999999", "linewidth": 0.7, "shrinkA": 1, "shrinkB": 5}
    far = offset not in PLACES[:NEAR]
    label = axes.annotate(name, point, offset, textcoords="offset points", arrowprops=leader if far else None, **align)
    label.update_positions(renderer)
    return label, Text.get_window_extent(label, renderer)  # the text's alone, without the line


def is_free(box: Bbox, inside: Bbox, taken: Sequence[Bbox]) -> bool:
    within = box.x0 >= inside.x0 and box.x1 <= inside.x1 and box.y0 >= inside.y0 and box.y1 <= inside.y1
    return within and not box.count_overlaps(taken)


def occupied(axes: Axes, figure: Figure, x: float, y: Mean) -> Bbox:
    """What a point and its bar take up, in pixels."""
    spread = y.spread or 0
    (left, bottom), (_, top) = axes.transData.transform([(x, y.value - spread), (x, y.value + spread)])
    pad = MARKER * figure.dpi / 72
    return Bbox([[left - pad, bottom - pad], [left + pad, top + pad]])
