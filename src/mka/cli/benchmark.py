"""mka bench, report and verify: compare mechanisms, draw results, check files."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from mka.cli.output import GO_ON, check_output, complain, is_first_rank
from mka.errors import InputError, printable
from mka.record.config import BenchmarkConfig

if TYPE_CHECKING:
    from mka.report.runs import Run

TABLE_WIDTH = 110
"""Width of the table, in characters, where the output is not a terminal."""


@dataclass(frozen=True)
class ReportConfig:
    """Regenerate tables and figures, and optionally one page for several runs.

    Runs may be finished or unfinished.
    """

    folders: tyro.conf.Positional[tuple[str, ...]]
    """Folders of `mka bench` runs; the page shows several side by side."""
    html: str | None = None
    """Write the page to this HTML file, which a browser opens without any other
    file."""
    markdown: str | None = None
    """Write the page to this Markdown file."""

    def __post_init__(self) -> None:
        if not self.folders:
            raise InputError("no folder is given; give one or more folders of `mka bench` runs")
        # Several folders only make sense for a page; each one's own report needs no
        # other.
        if len(self.folders) > 1 and self.html is None and self.markdown is None:
            raise InputError(
                f"{len(self.folders)} folders are given without a page; add --html FILE or "
                "--markdown FILE"
            )
        check_output("html", self.html)
        check_output("markdown", self.markdown)
        if self.html is not None and self.html == self.markdown:
            raise InputError(f"html and markdown are both {self.html!r}; give two names")


@dataclass(frozen=True)
class VerifyConfig:
    """Compare everything in a folder with its checksums.

    Prints one line per file; exit status 1 if a file is not whole.
    """

    folder: tyro.conf.Positional[str]
    """Folder of a `mka bench` run or of a saved model."""


def run_bench(config: BenchmarkConfig) -> int:
    """Train and evaluate what is missing, and print the table; returns 1 if a training
    fails."""
    # Checked before torch is loaded, which takes seconds: a mistake is reported at
    # once.
    config.resolved()
    from mka.distributed import RankLost
    from mka.experiments import run_benchmark
    from mka.record.results import Result
    from mka.report import result_lines
    from mka.training import NonFiniteLoss, OutOfMemory

    console = plain_console()

    def on_result(result: Result) -> None:
        """Print a result as soon as it is safe on disk."""
        console.print("\n".join(result_lines(result)))

    try:
        folder = run_benchmark(config, console, on_result)
    except NonFiniteLoss as error:
        return complain("mka", error, 1)
    except (RankLost, OutOfMemory) as error:
        # Every rank reports its own failure, because the others do not know of it.
        rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
        print(
            f"mka: {rank}{error}{f'; {GO_ON}' if isinstance(error, RankLost) else ''}",
            file=sys.stderr,
        )
        return 1
    return finish(folder, console) if is_first_rank() else 0


def run_report(config: ReportConfig) -> int:
    """Write each folder's tables and figures, then the page for all of them; returns
    0."""
    from mka.report import read_runs, write_pages

    console, folders = plain_console(), [Path(folder) for folder in config.folders]
    # All are read before anything is written: a damaged one leaves every report as it
    # was.
    runs = read_runs(folders)
    for folder, run in zip(folders, runs, strict=True):
        finish(folder, console, run)
    html, markdown = (
        None if name is None else Path(name) for name in (config.html, config.markdown)
    )
    for path in write_pages(runs, html, markdown):
        console.print(f"Page     {printable(str(path))}")
    return 0


def run_verify(config: VerifyConfig) -> int:
    """Print one line per file; returns 1 if a file is not whole."""
    from mka.record.verify import BAD, WHOLE, verify

    found = verify(Path(config.folder))
    for name, state in found:
        print(printable(f"{name}: {state}"))
    bad = sum(state in BAD for _, state in found)
    print(f"{sum(state == WHOLE for _, state in found):,} whole, {bad:,} not")
    return int(bad > 0)


def plain_console() -> Any:
    """A console that prints text unchanged; on ranks other than the first it prints
    nothing."""
    from rich.console import Console

    # Markup and emoji are off because a folder's name may hold a bracket or a colon.
    return Console(
        highlight=False, soft_wrap=True, markup=False, emoji=False, quiet=not is_first_rank()
    )


def finish(folder: Path, console: Any, run: "Run | None" = None) -> int:
    """Write a folder's report and print its table; returns 0.

    run: what was already read from the folder; None: it is read here.
    """
    from rich.console import Console

    from mka.record.results import RunFolder
    from mka.report import console_table, differences, read_runs, write_report

    run = run or read_runs([folder])[0]
    written = write_report(folder, run)
    console.print()
    # Without a terminal, rich would take 80 columns and fold the table.
    plain_width = None if console.is_terminal else TABLE_WIDTH
    Console(highlight=False, width=plain_width).print(console_table(run.summaries))
    for difference in differences(run.rows):
        console.print(difference.line())
    for remark in run.remarks:
        print(printable(f"warning: {folder}: {remark}"), file=sys.stderr)
    reports = ", ".join(str(path) for path in written)
    console.print(printable(f"Results  {RunFolder(folder).results}"))
    console.print(printable(f"Report   {reports}"))
    return 0
