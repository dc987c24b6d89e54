"""The numbers that people read."""

import io
from collections.abc import Callable, Sequence

import pytest
from rich.console import Console

from mka.record.mechanisms import MECHANISMS
from mka.record.results import Result
from mka.report import Summary, console_table, markdown_table, result_lines, summarize

MakeResult = Callable[..., Result]

NUMBERS = {
    "train_loss": 4.56789,
    "eval_loss": 4.5,
    "perplexity": 90.0171,
    "bits_per_byte": 1.89,
    "train_seconds": 63.21,
    "eval_seconds": 5.04,
    "tokens_per_second": 4136.7,
    "memory_allocated": 3 * 2**29,
    "memory_reserved": 300 * 2**20,
    "cache_bytes_per_token": 4300.4,
}


def cells(table: str) -> list[dict[str, str]]:
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def printed(summaries: Sequence[Summary], width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    with console.capture() as capture:
        console.print(console_table(summaries))
    return capture.get()


def test_markdown_numbers_and_units(make_result: MakeResult) -> None:
    (row,) = cells(markdown_table(summarize([make_result(**NUMBERS)])))
    assert row == {
        "Mechanism": "MKA",
        "Train loss": "4.5679",
        "Eval loss": "4.5000",
        "Perplexity": "90.02",
        "Bits/byte": "1.8900",
        "Train time": "63.2 s",
        "Eval time": "5.0 s",
        "Tokens/s": "4,137",
        "Memory allocated": "1.50 GiB",
        "Memory reserved": "300.0 MiB",
        "Parameters": "5,273,344",
        "MFLOPs/token": "12.35",
        "Cache B/token": "4,300",
    }


def test_markdown_spread_over_seeds(make_result: MakeResult) -> None:
    losses, memory = (4.0, 4.2), (100 * 2**20, 102 * 2**20)
    rows = [make_result(seed=s, eval_loss=losses[s], memory_allocated=memory[s]) for s in (0, 1)]
    rows.append(make_result("mha", train_seconds=1234.5))
    first, second = cells(markdown_table(summarize(rows)))
    assert first["Train time"] == "1,234 s"
    assert (first["Seeds"], second["Seeds"]) == ("1", "2")
    assert "±" not in first["Eval loss"]
    assert second["Eval loss"] == "4.1000 ± 0.1414"
    assert second["Memory allocated"] == "101.0 ± 1.4 MiB"
    assert second["Memory reserved"] == "n/a"


def test_no_row_is_marked_as_the_winner(make_result: MakeResult) -> None:
    table = markdown_table(summarize(make_result(kind) for kind in MECHANISMS))
    assert "*" not in table


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
@pytest.mark.parametrize("scale", [1, 400])
def test_the_terminal_table_is_whole_at_100_columns(
    make_result: MakeResult, seeds: tuple[int, ...], scale: int
) -> None:
    rows = [
        make_result(
            kind,
            seed,
            train_seconds=60.0 * scale + seed,
            memory_allocated=300 * 2**20 * scale // 10 + seed,
            parameters=5_273_344 * (25 if scale > 1 else 1),
            cache_bytes_per_token=4096.0 * (9 if scale > 1 else 1),
        )
        for kind in MECHANISMS
        for seed in seeds
    ]
    summaries = summarize(rows)
    text = printed(summaries)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert Console(width=300).measure(console_table(summaries)).maximum <= 100
    for summary in summaries:
        line = next(line for line in text.splitlines() if line.split()[:1] == [summary.name])
        assert f"{summary.perplexity.value:.2f}" in line
    assert ("3 seeds" in text) == (len(seeds) == 3)


def test_terminal_table_of_nothing_is_only_its_headings() -> None:
    assert "Perplex" in printed([])


def test_result_lines(make_result: MakeResult) -> None:
    assert result_lines(make_result(**NUMBERS)) == [
        "📊 Results for MKA:",
        "  Train Loss: 4.5679",
        "  Eval Loss: 4.5000",
        "  Perplexity: 90.02",
        "  Train Time: 63.2 s",
        "  Eval Time: 5.0 s",
        "  Memory Allocated: 1.50 GiB",
        "  Memory Reserved: 300.0 MiB",
        "  Bits per Byte: 1.8900",
        "  Tokens per Second: 4,137",
        "  Parameters: 5,273,344",
        "  Cache Bytes per Token: 4,300",
    ]


def test_result_lines_name_the_seed_among_several_and_skipped_steps(
    make_result: MakeResult,
) -> None:
    lines = result_lines(
        make_result(seed=3, config={"seeds": [2, 3]}, memory_allocated=None, skipped_steps=4)
    )
    assert lines[0] == "📊 Results for MKA (seed 3):"
    assert "  Memory Allocated: n/a" in lines
    assert lines[-1] == "  Skipped Steps: 4"
    assert result_lines(make_result(config={}))[0] == "📊 Results for MKA:"
