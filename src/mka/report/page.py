"""Run folders -> a folder's table.md and figures/, one self-contained HTML page, and the
same page as Markdown. The same results give the same bytes."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from mka.memory.options import LEVEL_TITLES
from mka.record.intervals import verdict
from mka.record.mechanisms import MECHANISMS
from mka.record.results import Result, RunFolder
from mka.report.charts import cost_charts, label, loss_charts, quality_charts
from mka.report.differences import Difference, differences, differences_table
from mka.report.drawing import ON_WHITE, drawn
from mka.report.facts import configuration, environments, escape, fact_rows, setting_rows
from mka.report.routers import router_views
from mka.report.runs import Run, read_run
from mka.report.summary import Summary, summarize
from mka.report.tables import COLUMNS, Cell, markdown_table
from mka.report.warnings import warnings
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


LEGEND = """\
- **Train loss**: mean over the last tenth of the steps, in nats per token.
- **Eval loss**: mean over the held-out split, in nats per token.
- **Perplexity**: exp(eval loss), per token of the tokenizer. It compares only runs with
  one tokenizer and one corpus.
- **Bits/byte**: held-out loss per byte of text, in bits. It compares runs across tokenizers.
- **Train time**, **Eval time**: seconds; evaluation is never part of the train time.
- **Tokens/s**: tokens trained on per second of train time.
- **Memory allocated**, **Memory reserved**: peak during training, n/a where it could not be
  measured. On the CPU, allocated is the peak resident memory above the one before training.
- **Parameters**: all of the model's.
- **MFLOPs/token**: millions of floating-point operations of a token's forward pass, matrix
  products alone, two per multiply-add, the mean over the context.
- **Cache B/token**: bytes that decoding keeps per token, in bfloat16, at the run's sequence
  length.
- **Seeds**: seeds behind the row. With several, a number is the mean ± the sample standard
  deviation.

A difference smaller than the spread over seeds, or any difference of single runs, may be noise.
"""

FIGURES = {
    "loss_tokens": (
        "Train and held-out loss against tokens trained on; the first steps may lie "
        "above the figure"
    ),
    "loss_time": "The same against seconds of training",
    "perplexity_cache": "Held-out perplexity against cache bytes per token",
}


def write_report(folder: Path, run: Run | None = None) -> list[Path]:
    """Write table.md and figures/ of a run folder and return their paths, table.md
    first.

    `run`: what was read from the folder; None: it is read now. The same results give
    the same bytes. Raises InputError for a folder without results.
    """
    run = run or read_run(folder, folder.name)
    figures = save_figures(folder, run)
    table = RunFolder(folder).table
    write_atomically(table, report_text(run.rows, figures))
    return [table, *figures]


def save_figures(folder: Path, run: Run) -> list[Path]:
    """Draw the figures of a run folder and return their paths.

    Without curves the two loss figures are left out.
    """
    paths = []
    for chart in [*loss_charts([run]), *quality_charts([run])]:
        paths.append(RunFolder(folder).figures / f"{chart.name.replace('-', '_')}.svg")
        write_atomically(paths[-1], drawn(chart, ON_WHITE) + "\n")
    return paths


def report_text(rows: Sequence[Result], figures: Iterable[Path] = ()) -> str:
    """The text of table.md; `figures` are those written beside it."""
    summaries = summarize(rows)
    parts = [
        f"# {escape(heading(rows))}\n\n{seeds_sentence(summaries)}",
        markdown_table(summaries),
        differences_table(differences(rows)),
        "".join(f"- {summary.name}: {summary.title}\n" for summary in summaries),
        *[f"![{FIGURES[path.stem]}]({path.parent.name}/{path.name})\n" for path in figures],
        "## Columns\n\n" + LEGEND,
        "## Configuration\n\n" + configuration(rows),
        "## Environment\n\n" + environments(rows),
    ]
    return "\n".join(part for part in parts if part)


def heading(rows: Sequence[Result]) -> str:
    """The title of a report: its corpus and preset, where they are known."""
    config = rows[-1].config
    corpus = f" on {config['dataset']}" if "dataset" in config else ""
    preset = f", preset {config['preset']}" if "preset" in config else ""
    return f"Attention mechanisms compared{corpus}{preset}"


def seeds_sentence(summaries: Sequence[Summary]) -> str:
    """Which seeds are behind the rows: once where all have the same, otherwise by
    mechanism."""
    by_seeds: dict[tuple[int, ...], list[str]] = {}
    for summary in summaries:
        by_seeds.setdefault(summary.seeds, []).append(summary.name)
    if len(by_seeds) == 1:
        return f"Each mechanism with {name_seeds(summaries[0].seeds)}.\n"
    return (
        "; ".join(f"{', '.join(names)}: {name_seeds(seeds)}" for seeds, names in by_seeds.items())
        + ".\n"
    )


def name_seeds(seeds: Sequence[int]) -> str:
    """How many seeds, and which."""
    word = "one seed" if len(seeds) == 1 else f"{len(seeds)} seeds"
    return f"{word} ({', '.join(map(str, seeds))})"
