"""A run folder's results -> its table.md and figures/."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from mka.record.results import Result, RunFolder
from mka.report.charts import loss_charts, quality_charts
from mka.report.conditions import configuration, environments
from mka.report.differences import differences, differences_table
from mka.report.drawing import ON_WHITE, drawn
from mka.report.runs import Run, read_run
from mka.report.summary import Summary, summarise
from mka.report.tables import markdown_table
from mka.storage import write_atomically

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
    summaries = summarise(rows)
    parts = [
        f"# {heading(rows)}\n\n{seeds_sentence(summaries)}",
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
