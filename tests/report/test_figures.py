"""Figures are well-formed, named, deterministic and legible."""

import itertools
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import vl_convert

from mka.errors import InputError
from mka.record.mechanisms import MECHANISMS
from mka.record.results import Result, append_result, write_curve
from mka.report import read_runs, save_figures
from mka.report.charts import Axis, Chart, HeatMap, Point, Series, quality_charts
from mka.report.drawing import DASHES, IN_PAGE, ON_WHITE, VERSION, Palette, chart_of, drawn
from mka.report.summary import compact

MakeResult = Callable[..., Result]
FillFolder = Callable[..., Path]

NAMES = ["loss_tokens.svg", "loss_time.svg", "perplexity_cache.svg"]
TEXT = "{http://www.w3.org/2000/svg}text"


def figures(folder: Path) -> list[Path]:
    return save_figures(folder, read_runs([folder])[0])


def texts(path: Path) -> list[str]:
    root = ElementTree.fromstring(path.read_bytes())
    return ["".join(element.itertext()) for element in root.iter(TEXT)]


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_every_figure_is_svg_with_every_mechanism_as_text(
    fill_folder: FillFolder, seeds: tuple[int, ...]
) -> None:
    folder = fill_folder(seeds=seeds)
    paths = figures(folder)
    assert [path.name for path in paths] == NAMES
    assert {path.parent for path in paths} == {folder / "figures"}
    for path in paths:
        found = texts(path)
        assert {kind.upper() for kind in MECHANISMS} <= set(found)
        assert any("mean of 3 seeds" in text for text in found) == (len(seeds) == 3)
        assert "var(--" not in path.read_text(), "a file has colors of its own"


def test_axes_say_what_and_in_which_unit(fill_folder: FillFolder) -> None:
    tokens, time, cache = (texts(path) for path in figures(fill_folder()))
    assert {"tokens trained on", "loss (nats per token)"} <= set(tokens)
    assert {"training time (s)", "loss (nats per token)"} <= set(time)
    named = {"cache per token (bytes, bfloat16), log scale", "held-out perplexity (per token)"}
    assert named <= set(cache)


def test_without_curves_only_the_cache_is_drawn(tmp_path: Path, make_result: MakeResult) -> None:
    append_result(tmp_path, make_result("mha"))
    assert [path.name for path in figures(tmp_path)] == NAMES[2:]


@pytest.mark.parametrize(
    "sizes", [{"mka": 5000.0}, {"mka": 4100.0, "fmka": 8100.0}, {"mka": 64.0, "mha": 65536.0}]
)
def test_the_cache_axis_has_numbers(
    tmp_path: Path, make_result: MakeResult, sizes: dict[str, float]
) -> None:
    for kind, size in sizes.items():
        result = make_result(kind, cache_bytes_per_token=size, perplexity=90.5)
        append_result(tmp_path, result)
    cache = texts(figures(tmp_path)[0])
    assert {kind.upper() for kind in sizes} <= set(cache)
    assert len({text for text in cache if re.fullmatch(r"[\d,.]+", text)}) >= 2


def test_a_curve_without_held_out_points_is_drawn(
    fill_folder: FillFolder, make_result: MakeResult
) -> None:
    folder = fill_folder(kinds=["mha"])
    append_result(folder, make_result("mla"))
    write_curve(folder, "mla", 0, [])
    assert "MHA" in texts(figures(folder)[0])


def test_an_unknown_mechanism_is_an_input_error(tmp_path: Path, make_result: MakeResult) -> None:
    append_result(tmp_path, make_result("flash"))
    with pytest.raises(InputError, match="unknown attention_type"):
        figures(tmp_path)
    assert not (tmp_path / "figures").exists()


def test_each_mechanism_has_its_own_color_and_marker() -> None:
    for name in ("color", "color_dark", "marker", "title", "class_path"):
        assert len({getattr(row, name) for row in MECHANISMS.values()}) == len(MECHANISMS), name


def chart(**changes: Any) -> Chart:
    series = [
        Series("MHA", "mha", 0, [Point(1, 2, "MHA <b>: 2", 1.5, 2.5)], [(0, 3), (1, 2)]),
        Series("MHA w64", "mha", 1, [Point(2, 3, 'a "quote"')], [(0, 4), (2, 3)]),
    ]
    values: dict[str, Any] = {"name": "one", "title": "One", "how": "so", "series": series}
    values |= {"x": Axis("x"), "y": Axis("y"), "table": ([], [])}
    return Chart(**values | changes)


def test_a_variant_is_hollow_and_dashed() -> None:
    lines, bars, points = chart_of(chart(), ON_WHITE)["layer"]
    color = MECHANISMS["mha"].color
    assert points["encoding"]["fill"]["scale"]["range"] == [color, ON_WHITE.ground]
    assert lines["encoding"]["strokeDash"]["scale"]["range"] == [*DASHES[:2]]
    assert [row["label"] for row in bars["data"]["values"]] == ["MHA"]


def marks(text: str) -> list[str]:
    """What can be pointed at."""
    return re.findall(r'<path aria-label="([^"]*)" role="graphics-symbol" aria-role', text)


def test_a_variant_is_dashed_where_it_has_no_line_too() -> None:
    points = chart_of(chart(), ON_WHITE)["layer"][-1]
    assert points["encoding"]["strokeDash"]["scale"]["range"] == [*DASHES[:2]]


def test_points_beyond_the_limits_are_not_marks() -> None:
    text = drawn(chart(y=Axis("y", limits=(1.5, 2.5))))
    assert marks(text) == ["MHA &lt;b&gt;: 2"]


@pytest.mark.parametrize(
    ("values", "numbers"),
    [
        ((0.25, 0.85), {"0.3", "0.5", "0.8"}),
        ((0.06, 40), {"0.1", "1", "10"}),
        ((0.2, 30), {"0.2", "0.5", "1", "10", "20"}),
        ((2000, 9000), {"2k", "3k", "9k"}),
        ((1e-3, 1e4), {"1", "10k"}),
    ],
)
@pytest.mark.parametrize("log", [0, 10])
def test_numbers_below_one_have_no_prefix(
    log: Literal[0, 10], values: tuple[float, float], numbers: set[str]
) -> None:
    points = [Point(x, y, "words") for x, y in enumerate(values)]
    text = drawn(chart(y=Axis("y", log=log), series=[Series("MHA", "mha", 0, points, [])]))
    written = re.findall(r'text-anchor="end"[^>]*>([^<]*)</text>', text)
    assert len({*written} - {""}) >= 2
    assert not [number for number in written if number.endswith("m")]
    if log:
        assert numbers <= {*written}


def named(places: Sequence[tuple[float, float]]) -> Chart:
    series = [
        Series(f"Series {i}", "mha", i, [Point(x, y, "words")], [])
        for i, (x, y) in enumerate(places)
    ]
    return chart(series=series, is_named=True)


def names_in(text: str) -> dict[str, tuple[float, float, float]]:
    """Left, right and baseline of each name that is shown beside a point, in pixels; a letter is
    taken to be half as wide as it is high."""
    found = {}
    pattern = r'<text text-anchor="(\w+)" transform="translate\(([-\d.]+),([-\d.]+)\)"'
    pattern += r'[^>]*font-size="12px"[^>]*opacity="1">(Series \d+)</text>'
    for anchor, x, y, name in re.findall(pattern, text):
        width = 6 * len(name)
        left = float(x) - (width if anchor == "end" else 0)
        found[name] = (left, left + width, float(y))
    return found


@pytest.mark.parametrize("apart", [0.0, 0.001, 0.2])
def test_names_beside_points_never_overlap(apart: float) -> None:
    """Six points at one place, nearly at one place, and apart."""
    places = [(1000 * (1 + apart * i), 90 + 9 * apart * i) for i in range(6)]
    shown = names_in(drawn(named([(0, 80), *places, (2000, 100)])))
    assert len(shown) == 8
    for one, other in itertools.combinations(shown.values(), 2):
        assert one[1] <= other[0] or other[1] <= one[0] or abs(one[2] - other[2]) >= 11


def test_a_name_without_room_is_left_to_the_legend() -> None:
    text = drawn(named([(1, 1)] * 30))
    assert 6 <= len(names_in(text)) < 30
    root = ElementTree.fromstring(text)
    legend = [group for group in root.iter() if group.get("class", "").endswith("legend-label")]
    assert {"".join(group.itertext()) for group in legend} == {f"Series {i}" for i in range(30)}


def test_nothing_to_draw_is_no_chart(tmp_path: Path, make_result: MakeResult) -> None:
    append_result(tmp_path, make_result("mha"))
    (run,) = read_runs([tmp_path])
    endless = replace(run, rows=[make_result("mha", perplexity=math.inf)])
    assert quality_charts([endless]) == []
    assert save_figures(tmp_path, endless) == []


def test_the_words_of_a_point_are_its_label_and_markup_in_them_is_text() -> None:
    root = ElementTree.fromstring(drawn(chart()))
    labels = [element.get("aria-label") for element in root.iter() if element.get("aria-label")]
    assert "MHA <b>: 2" in labels
    assert 'a "quote"' in labels


def test_the_same_chart_gives_the_same_bytes_and_its_own_ids() -> None:
    """However many were drawn before it."""
    one = drawn(chart())
    assert drawn(chart()) == one
    other = drawn(chart(name="other"))
    ids = [set(re.findall(r' id="([^"]+)"', text)) for text in (one, other)]
    assert ids[0]
    assert not ids[0] & ids[1]
    for text, names in zip((one, other), ids, strict=True):
        assert set(re.findall(r"url\(#([^)]+)\)", text)) == names


def test_the_page_has_every_color_of_its_style_sheet() -> None:
    text = drawn(chart())
    assert "var(--mha)" in text
    assert not re.search(r'(?:fill|stroke)="#', text)


def test_a_heat_map_has_a_cell_per_layer_piece_and_level() -> None:
    shares = [[[0.5, 0.25, 0.25]] * 4, [[1.0, 0.0, 0.0]] * 4]
    text = drawn(HeatMap("heat", "Router", "shares", shares, [0, 8, 16, 24, 32]))
    labels = re.findall(r'aria-label="(layer \d, tokens [^"]+)"', text)
    assert len(labels) == 2 * 4 * 3
    assert "layer 1, tokens 24 to 31: L1 1.000" in labels
    assert 'fill="var(--level2)"' in text


@pytest.mark.parametrize("palette", [ON_WHITE, IN_PAGE])
@pytest.mark.parametrize("y", [Axis("y"), Axis("y", log=10), Axis("y", limits=(1, 4))])
def test_specifications_are_plain_json_and_vega_lite_drops_nothing(
    palette: Palette, y: Axis, capfd: pytest.CaptureFixture[str]
) -> None:
    specification = chart_of(chart(y=y), palette)
    assert json.loads(json.dumps(specification, allow_nan=False)) == specification
    vl_convert.vegalite_to_vega(specification, vl_version=VERSION, show_warnings=True)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0"), (950, "950"), (1500, "1.5k"), (2e6, "2M"), (3e9, "3G")]
)
def test_compact_numbers(number: float, text: str) -> None:
    assert compact(number) == text


def test_words_that_look_like_a_drawing_stay() -> None:
    """Names of folders reach the labels of a chart."""
    points = [Point(1.0, 2.0, "a"), Point(3.0, 4.0, "b")]
    names = ("gradclip5 clip7", 'x width="3.14159"', "url(#clip1)")
    series = [Series(name, "mha", 0, points, []) for name in names]
    chart = Chart("loss", "t", "h", Axis("tokens"), Axis("loss"), series, ([], []))
    first, second = drawn(chart, ON_WHITE), drawn(chart, ON_WHITE)
    assert first == second
    assert "gradclip5 clip7" in first
    assert "3.14159" in first
