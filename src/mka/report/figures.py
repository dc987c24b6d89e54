"""Curves and results -> SVG figures: the same results give the same bytes.

loss_tokens.svg       train loss (smoothed lines) and held-out loss (points) against tokens trained on
loss_time.svg         the same against seconds of training
perplexity_cache.svg  held-out perplexity against cache bytes per token
"""

from collections.abc import Callable, Iterable, Sequence
from math import isfinite
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from mka.report.curves import cut, smooth
from mka.report.labels import label_points
from mka.report.runs import Arm, seed_means
from mka.report.style import Look, compact, empty_figure, looks_of, save_svg, title
from mka.report.summary import Summary, latest, shown_name, summarise
from mka.results import CurvePoint, Result

Curves = dict[Arm, list[CurvePoint]]


def save_figures(folder: Path, results: Iterable[Result]) -> list[Path]:
    """Write the figures of a run folder to its figures/ and return their paths.

    Curves are read from the folder; without any, the two loss figures are left out.
    """
    rows = latest(results)
    curves = seed_means(folder, rows)
    figures: dict[str, Callable[[], Figure]] = {}
    if any(curves.values()):
        figures["loss_tokens"] = lambda: loss_figure(curves, "tokens", seeds_note(rows))
        figures["loss_time"] = lambda: loss_figure(curves, "seconds", seeds_note(rows))
    drawable = [summary for summary in summarise(rows) if isfinite(summary.perplexity.value)]
    if drawable:
        figures["perplexity_cache"] = lambda: cache_figure(drawable, seeds_note(rows))
    return [save_svg(folder / "figures" / f"{name}.svg", draw) for name, draw in figures.items()]


def seeds_note(rows: Sequence[Result]) -> str:
    seeds = len({row.seed for row in rows})
    return f"; mean of {seeds} seeds" if seeds > 1 else ""


def loss_figure(curves: Curves, against: str, note: str) -> Figure:
    """Loss against "tokens" or "seconds". The first steps are cut off, or nothing else could be told apart."""
    figure, axes = empty_figure(width=0.76)
    looks = looks_of(curves)
    for arm, points in by_final_loss(curves):
        draw_curve(axes, arm, looks[arm], points, against)
    axes.set_ylim(*cut(curves.values()))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: compact(x)))
    axes.set_xlabel({"tokens": "tokens trained on", "seconds": "training time (s)"}[against])
    axes.set_ylabel("loss (nats per token)")
    where = {"tokens": "tokens", "seconds": "training time"}[against]
    title(axes, f"Loss against {where}", f"points: held-out; lines: train, smoothed{note}")
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, borderaxespad=0, labelspacing=0.8)
    return figure


def draw_curve(axes: Axes, arm: Arm, look: Look, points: Sequence[CurvePoint], against: str) -> None:
    train = [(getattr(point, against), point.train_loss) for point in points if point.train_loss is not None]
    held_out = [(getattr(point, against), point.eval_loss) for point in points if point.eval_loss is not None]
    line = {"color": look.colour, "linestyle": look.dashes, "linewidth": 0.9}
    axes.plot([x for x, _ in train], smooth([y for _, y in train]), alpha=0.75, **line)
    edge = look.colour if look.hollow else "white"
    point = {"marker": look.marker, "markersize": 6.5, "markeredgecolor": edge, "markeredgewidth": 0.4}
    point["markerfacecolor"] = "white" if look.hollow else look.colour
    axes.plot([x for x, _ in held_out], [y for _, y in held_out], linestyle="none", zorder=3, **point)
    axes.plot([], [], label=shown_name(*arm), **line, **point)


def by_final_loss(curves: Curves) -> list[tuple[Arm, list[CurvePoint]]]:
    """The highest curve first, so that the legend reads in the order of the curves' ends."""
    drawn = [(arm, points) for arm, points in curves.items() if points]
    final = {arm: [p.eval_loss for p in points if p.eval_loss is not None][-1:] for arm, points in drawn}
    return sorted(drawn, key=lambda item: final[item[0]], reverse=True)


def cache_figure(summaries: Sequence[Summary], note: str) -> Figure:
    """Perplexity against cache bytes per token (log scale); bars are a sample standard deviation over seeds."""
    figure, axes = empty_figure()
    looks = looks_of((summary.attention_type, summary.variant) for summary in summaries)
    for summary in summaries:
        drawn = looks[summary.attention_type, summary.variant]
        spread = summary.perplexity.spread
        look = {"color": drawn.colour, "marker": drawn.marker, "markersize": 8, "capsize": 3, "elinewidth": 1}
        look |= {"markerfacecolor": "white"} if drawn.hollow else {}
        axes.errorbar(summary.cache_bytes_per_token, summary.perplexity.value, yerr=spread, linestyle="none", **look)
    axes.set_xscale("log", base=2)
    axes.margins(0.12)
    sizes = [summary.cache_bytes_per_token for summary in summaries]
    # Powers of two, unless so few of them fit that the axis could not be read.
    axes.xaxis.set_major_locator(LogLocator(base=2) if max(sizes) >= 4 * min(sizes) else MaxNLocator(5))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axes.set_xlabel("cache per token (bytes, bfloat16, log scale)")
    axes.set_ylabel("held-out perplexity (per token)")
    bars = "; bars: one standard deviation" if note else ""
    title(axes, "Held-out perplexity against the size of the cache", f"lower left is better{note}{bars}")
    label_points(axes, figure, [(s.name, s.cache_bytes_per_token, s.perplexity) for s in summaries])
    return figure
