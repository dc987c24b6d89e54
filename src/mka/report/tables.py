"""Summaries -> a Markdown table, a terminal table; one result -> the lines printed
after its mechanism.

No cell is marked as the best: a single difference may be noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import nan

from rich import box
from rich.table import Table

from mka.record.results import Result
from mka.report.summary import Mean, Summary, shown_name

MIB = 2**20
GIB = 2**30


@dataclass(frozen=True)
class Cell:
    """A number, its spread over seeds ("" for none) and its unit, all as text; and the
    number to sort by."""

    value: str
    spread: str = ""
    unit: str = ""
    number: float = nan

    def line(self) -> str:
        """Number, spread and unit on one line."""
        spread = f" ± {self.spread}" if self.spread else ""
        return f"{self.value}{spread}{self.unit}"

    def stacked(self) -> str:
        """The spread under the number, for narrow columns."""
        spread = f"\n±{self.spread}" if self.spread else ""
        return f"{self.value}{self.unit}{spread}"


def cell(mean: Mean, decimals: int, unit: str = "", scale: float = 1) -> Cell:
    """A mean in units of `scale`, to that many decimals."""
    spread = "" if mean.spread is None else f"{mean.spread / scale:,.{decimals}f}"
    return Cell(f"{mean.value / scale:,.{decimals}f}", spread, unit, mean.value)


def exact(number: float | None, text: str) -> Cell:
    """A number that does not depend on the seed."""
    return Cell("n/a") if number is None else Cell(text.format(number), number=number)


def rough(mean: Mean, unit: str = "") -> Cell:
    """A measured time or speed: no decimals from 1000 on."""
    return cell(mean, 0 if mean.value >= 1000 else 1, unit)


def memory_cell(mean: Mean | None) -> Cell:
    """Bytes as MiB, or as GiB from one on; "n/a" where they were not measured."""
    if mean is None:
        return Cell("n/a")
    return cell(mean, 2, " GiB", GIB) if mean.value >= GIB else cell(mean, 1, " MiB", MIB)


@dataclass(frozen=True)
class Column:
    """`heading` and `narrow` are the terminal's; without a heading the column is only
    in the Markdown table."""

    cell: Callable[[Summary], Cell]
    heading: str | None = None
    narrow: Callable[[Summary], Cell] | None = None


# What fits in 100 columns of a terminal: memory reserved, FLOPs and the number of seeds
# are left out there.
COLUMNS = {
    "Mechanism": Column(lambda s: Cell(s.name), ""),
    "Train loss": Column(lambda s: cell(s.train_loss, 4), "Train\nloss"),
    "Eval loss": Column(lambda s: cell(s.eval_loss, 4), "Eval\nloss"),
    "Perplexity": Column(lambda s: cell(s.perplexity, 2), "Perplex-\nity"),
    "Bits/byte": Column(lambda s: cell(s.bits_per_byte, 4), "Bits\n/byte"),
    "Train time": Column(
        lambda s: rough(s.train_seconds, " s"), "Train\n(s)", lambda s: rough(s.train_seconds)
    ),
    "Eval time": Column(
        lambda s: rough(s.eval_seconds, " s"), "Eval\n(s)", lambda s: rough(s.eval_seconds)
    ),
    "Tokens/s": Column(lambda s: rough(s.tokens_per_second), "Tokens\n/s"),
    "Memory allocated": Column(lambda s: memory_cell(s.memory_allocated), "Memory\nallocated"),
    "Memory reserved": Column(lambda s: memory_cell(s.memory_reserved)),
    "Parameters": Column(
        lambda s: exact(s.parameters, "{:,}"),
        "Param-\neters",
        lambda s: Cell(f"{s.parameters / 1e6:,.2f}M"),
    ),
    "MFLOPs/token": Column(
        lambda s: exact(None if s.flops_per_token is None else s.flops_per_token / 1e6, "{:,.2f}")
    ),
    "Cache B/token": Column(lambda s: exact(s.cache_bytes_per_token, "{:,.0f}"), "Cache\nB/token"),
    "Seeds": Column(lambda s: exact(s.num_seeds, "{}")),
}


def markdown_table(summaries: Sequence[Summary]) -> str:
    """A Markdown table, one row a mechanism; "mean ± sample standard deviation" with
    several seeds."""
    several = any(summary.num_seeds > 1 for summary in summaries)
    headers = [header for header in COLUMNS if several or header != "Seeds"]
    rules = [":--" if header == "Mechanism" else "--:" for header in headers]
    rows = [[COLUMNS[header].cell(summary).line() for header in headers] for summary in summaries]
    return "".join(f"| {' | '.join(row)} |\n" for row in [headers, rules, *rows])


def console_table(summaries: Sequence[Summary]) -> Table:
    """The same for a terminal of 100 columns, the spread under each number."""
    counts = sorted({summary.num_seeds for summary in summaries})
    several = counts[-1:] > [1]
    caption = (
        f"mean and standard deviation over {' to '.join(map(str, counts))} seeds"
        if several
        else None
    )
    table = Table(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0),
        leading=int(several),
        caption=caption,
    )
    columns = [column for column in COLUMNS.values() if column.heading is not None]
    for column in columns:
        table.add_column(column.heading or "", justify="right" if column.heading else "left")
    for summary in summaries:
        table.add_row(*[(column.narrow or column.cell)(summary).stacked() for column in columns])
    return table


def result_lines(result: Result) -> list[str]:
    """What is printed when one mechanism and seed is done; the seed is named where
    there are several."""
    seeds = result.config.get("seeds") or ()
    seed = f" (seed {result.seed})" if len(seeds) > 1 else ""
    lines = [
        f"📊 Results for {shown_name(result.attention_type, result.variant)}{seed}:",
        f"  Train Loss: {result.train_loss:.4f}",
        f"  Eval Loss: {result.eval_loss:.4f}",
        f"  Perplexity: {result.perplexity:.2f}",
        f"  Train Time: {result.train_seconds:.1f} s",
        f"  Eval Time: {result.eval_seconds:.1f} s",
        f"  Memory Allocated: {memory_text(result.memory_allocated)}",
        f"  Memory Reserved: {memory_text(result.memory_reserved)}",
        f"  Bits per Byte: {result.bits_per_byte:.4f}",
        f"  Tokens per Second: {result.tokens_per_second:,.0f}",
        f"  Parameters: {result.parameters:,}",
        f"  Cache Bytes per Token: {result.cache_bytes_per_token:,.0f}",
    ]
    return [*lines, f"  Skipped Steps: {result.skipped_steps}"] if result.skipped_steps else lines


def memory_text(num_bytes: int | None) -> str:
    """Bytes in words, "n/a" where they were not measured."""
    return memory_cell(None if num_bytes is None else Mean(num_bytes)).line()
