"""Run folders -> one self-contained HTML page, and the same as Markdown: the same
results give the same bytes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from mka.memory.options import LEVEL_TITLES
from mka.record.intervals import verdict
from mka.record.mechanisms import MECHANISMS
from mka.report.charts import cost_charts, label, loss_charts, quality_charts
from mka.report.conditions import escape, setting_rows
from mka.report.differences import Difference, differences
from mka.report.drawing import drawn
from mka.report.facts import fact_rows
from mka.report.routers import router_views
from mka.report.runs import Run
from mka.report.summary import Summary
from mka.report.tables import COLUMNS, Cell
from mka.report.warnings import warnings
from mka.report.write import LEGEND, heading
from mka.storage import write_atomically

TEMPLATES = Path(__file__).parent / "templates"
AGAINST = ("Eval loss vs. baseline", "95 % interval", "Verdict")


def write_pages(runs: Sequence[Run], html: Path | None, markdown: Path | None) -> list[Path]:
    """Write those that are asked for, whole or not at all; returns their paths. Raises
    OSError."""
    written = [(html, "page.html"), (markdown, "page.md")]
    texts = [(path, render(runs, name)) for path, name in written if path is not None]
    for path, text in texts:
        write_atomically(path, text)
    return [path for path, _ in texts]


def render(runs: Sequence[Run], template: str) -> str:
    """The text of one template, filled with the runs."""
    loader = FileSystemLoader(TEMPLATES)
    jinja = Environment(
        loader=loader,
        autoescape=select_autoescape(),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    jinja.filters |= {
        "draw": lambda chart: Markup(drawn(chart)),  # noqa: S704 (vl-convert escapes its words)
        "cell": escape,
    }
    jinja.globals["source"] = lambda name: Markup((TEMPLATES / name).read_text(encoding="utf-8"))  # noqa: S704
    return jinja.get_template(template).render(context(runs))


def context(runs: Sequence[Run]) -> dict[str, Any]:
    """What both templates are filled with."""
    rows = [row for run in runs for row in table_rows(run, runs)]
    return {
        "title": heading(runs[-1].rows),
        "runs": runs,
        "several": len(runs) > 1,
        "warnings": warnings(runs),
        "headings": headings(runs),
        "rows": rows,
        "lines": [[cell.line() for cell in row] for row in rows],
        "charts": [*loss_charts(runs), *quality_charts(runs), *cost_charts(runs)],
        "routers": router_views(runs),
        "levels": LEVEL_TITLES,
        "mechanisms": MECHANISMS,
        "legend": [line[2:].replace("**", "") for line in legend_lines()],
        "facts": fact_rows(runs),
        "settings": setting_rows([run.rows for run in runs]),
    }


def legend_lines() -> Sequence[str]:
    """The columns' meanings, one a line."""
    return LEGEND.partition("\n\n")[0].replace("\n  ", " ").splitlines()


def headings(runs: Sequence[Run]) -> list[str]:
    """The columns of the table; that of seeds only where there are several."""
    several = any(summary.num_seeds > 1 for run in runs for summary in run.summaries)
    names = [name for name in COLUMNS if several or name != "Seeds"]
    return [names[0], *names[1:3], *AGAINST, *names[3:]]


def table_rows(run: Run, runs: Sequence[Run]) -> list[list[Cell]]:
    """A cell a heading."""
    against = {difference.name: difference for difference in differences(run.rows)}
    return [cells(run, summary, against.get(summary.name), runs) for summary in run.summaries]


def cells(
    run: Run, summary: Summary, against: Difference | None, runs: Sequence[Run]
) -> list[Cell]:
    """A row of the table, a cell per heading; `against`: the difference to the
    baseline, if any."""
    of = {name: column.cell(summary) for name, column in COLUMNS.items()}
    of["Mechanism"] = Cell(label(run, (summary.attention_type, summary.variant), runs))
    of |= dict(zip(AGAINST, difference_cells(against), strict=True))
    return [of[name] for name in headings(runs)]


def difference_cells(against: Difference | None) -> list[Cell]:
    """Value, interval and verdict: none for the baseline itself."""
    if against is None:
        return [Cell("")] * len(AGAINST)
    estimate = against.estimate
    value = Cell(f"{estimate.value:+.4f}", number=estimate.value)
    word = verdict(estimate)
    joined = {"not distinguishable": "from", "no verdict": "against"}.get(word, "than")
    named = f"{word} {joined} {against.baseline}"
    return [value, Cell(against.interval, number=estimate.low), Cell(named)]
