"""Figures are well-formed, named, deterministic and legible."""

import itertools
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Annotation, Text

from mka.config import ATTENTION_TITLES
from mka.limits import InputError
from mka.report import save_figures, summarise
from mka.report.figures import cache_figure
from mka.report.style import STYLES, compact
from mka.results import Result, append_result, read_results, write_curve

MakeResult = Callable[..., Result]
FillFolder = Callable[..., Path]

NAMES = ["loss_tokens.svg", "loss_time.svg", "perplexity_cache.svg"]


def texts(path: Path) -> list[str]:
    root = ElementTree.fromstring(path.read_bytes())
    return ["".join(element.itertext()) for element in root.iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_every_figure_is_svg_with_every_mechanism_as_text(fill_folder: FillFolder, seeds: tuple[int, ...]) -> None:
    folder = fill_folder(seeds=seeds)
    paths = save_figures(folder, read_results(folder))
    assert [path.name for path in paths] == NAMES
    assert {path.parent for path in paths} == {folder / "figures"}
    for path in paths:
        found = texts(path)
        assert {kind.upper() for kind in ATTENTION_TITLES} <= set(found)
        assert any("mean of 3 seeds" in text for text in found) == (len(seeds) == 3)


def test_axes_say_what_and_in_which_unit(fill_folder: FillFolder) -> None:
    folder = fill_folder()
    tokens, time, cache = (texts(path) for path in save_figures(folder, read_results(folder)))
    assert {"tokens trained on", "loss (nats per token)"} <= set(tokens)
    assert {"training time (s)", "loss (nats per token)"} <= set(time)
    assert {"cache per token (bytes, bfloat16, log scale)", "held-out perplexity (per token)"} <= set(cache)


def test_a_users_matplotlib_settings_change_nothing_and_are_left_alone(fill_folder: FillFolder) -> None:
    folder = fill_folder()
    rows = read_results(folder)
    before = [path.read_bytes() for path in save_figures(folder, rows)]
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "black", "svg.fonttype": "path"}):
        assert [path.read_bytes() for path in save_figures(folder, rows)] == before
        assert matplotlib.rcParams["font.size"] == 20


def test_without_curves_only_the_cache_is_drawn(tmp_path: Path, make_result: MakeResult) -> None:
    assert [path.name for path in save_figures(tmp_path, [make_result("mha")])] == NAMES[2:]
    assert save_figures(tmp_path, []) == []


@pytest.mark.parametrize("sizes", [{"mka": 5000.0}, {"mka": 4100.0, "fmka": 8100.0}, {"mka": 64.0, "mha": 65536.0}])
def test_the_cache_axis_has_ticks_enough(tmp_path: Path, make_result: MakeResult, sizes: dict[str, float]) -> None:
    rows = [make_result(kind, cache_bytes_per_token=size, perplexity=90.5) for kind, size in sizes.items()]
    cache = texts(save_figures(tmp_path, rows)[0])
    ticks = [text for text in cache if text.replace(",", "").isdigit() and int(text.replace(",", "")) >= 64]
    assert {kind.upper() for kind in sizes} <= set(cache)
    assert len(set(ticks) - {"90", "91"}) >= 3


def test_a_curve_without_held_out_points_is_drawn(fill_folder: FillFolder, make_result: MakeResult) -> None:
    folder = fill_folder(kinds=["mha"])
    append_result(folder, make_result("mla"))
    write_curve(folder, "mla", 0, [])
    tokens = texts(save_figures(folder, read_results(folder))[0])
    assert "MHA" in tokens
    assert "MLA" not in tokens


def test_an_unknown_mechanism_is_an_input_error(tmp_path: Path, make_result: MakeResult) -> None:
    with pytest.raises(InputError, match="unknown attention_type"):
        save_figures(tmp_path, [make_result("flash")])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("crowding", [0.0, 0.001, 0.2])
def test_names_never_overlap(make_result: MakeResult, crowding: float) -> None:
    """Six points at one place, nearly at one place, and apart."""
    rows = [
        make_result(kind, seed, cache_bytes_per_token=4096 * (1 + crowding * i), perplexity=90 + 9 * crowding * i)
        for i, kind in enumerate(ATTENTION_TITLES)
        for seed in (0, 1)
    ]
    figure = cache_figure(summarise(rows), "")
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    labels = [child for child in figure.axes[0].texts if isinstance(child, Annotation)]
    names = [label for label in labels if label.get_text().lower() in ATTENTION_TITLES]
    boxes = [Text.get_window_extent(label, canvas.get_renderer()) for label in names]
    assert len(boxes) == len(ATTENTION_TITLES)
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))


def test_each_mechanism_has_its_own_colour_and_marker() -> None:
    assert list(STYLES) == list(ATTENTION_TITLES)
    for column in zip(*STYLES.values(), strict=True):
        assert len(set(column)) == len(STYLES)


@pytest.mark.parametrize(("number", "text"), [(0, "0"), (950, "950"), (1500, "1.5k"), (2e6, "2M"), (3e9, "3G")])
def test_compact_numbers(number: float, text: str) -> None:
    assert compact(number) == text
