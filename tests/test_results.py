"""Results are never lost, files are never half-written."""

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from disks import full_at, no_space
from mka import results
from mka.config import InputError
from mka.results import CurvePoint, Result, append_result, read_curve, read_results, results_path


def make(kind: str = "mka", seed: int = 0, **changes: Any) -> Result:
    numbers: dict[str, Any] = {
        "train_loss": 4.6,
        "eval_loss": 4.5,
        "perplexity": math.exp(4.5),
        "bits_per_byte": 1.9,
        "eval_block_losses": [4.4, 4.6],
        "train_seconds": 60.0,
        "eval_seconds": 5.0,
        "tokens_per_second": 4000.0,
        "memory_allocated": 2**28,
        "memory_reserved": None,
        "parameters": 5_000_000,
        "cache_bytes_per_token": 4096.0,
        "flops_per_token": 1e7,
        "train_tokens": 240_000,
        "eval_tokens": 30_000,
        "skipped_steps": 0,
        "config": {"dataset": "naïve 記憶"},
        "environment": {"device": "cpu"},
    }
    return Result(attention_type=kind, seed=seed, **numbers | changes)


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    rows = [make("mha"), make("mka", 1), make("mha")]
    for row in rows:
        append_result(tmp_path, row)
    assert read_results(tmp_path) == rows
    assert rows[1].key == ("mka", 1)


@pytest.mark.parametrize("torn", [b'{"attention_type": "mk', "é".encode()[:1], b"\0\0\0", b"{"])
def test_a_torn_last_line_is_passed_over_and_closed_off(tmp_path: Path, torn: bytes) -> None:
    append_result(tmp_path, make("mha"))
    with results_path(tmp_path).open("ab") as file:
        file.write(torn)
    assert read_results(tmp_path) == [make("mha")]
    append_result(tmp_path, make("mla"))
    append_result(tmp_path, make("mka"))
    assert read_results(tmp_path) == [make("mha"), make("mla"), make("mka")]


def test_a_last_line_that_lacks_only_its_end_counts(tmp_path: Path) -> None:
    append_result(tmp_path, make("mha"))
    path = results_path(tmp_path)
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    append_result(tmp_path, make("mla"))
    assert read_results(tmp_path) == [make("mha"), make("mla")]


@pytest.mark.parametrize("room", [0, 1, 100])
def test_a_disk_that_fills_up_keeps_the_earlier_rows(tmp_path: Path, room: int) -> None:
    """The write is really cut short, after `room` bytes."""
    append_result(tmp_path, make("mha"))
    before = results_path(tmp_path).read_bytes()
    with full_at(len(before) + room), pytest.raises(OSError, match="File too large"):
        append_result(tmp_path, make("mla"))
    assert results_path(tmp_path).read_bytes() == before
    append_result(tmp_path, make("mka"))
    assert read_results(tmp_path) == [make("mha"), make("mka")]


def test_a_sync_that_fails_keeps_the_earlier_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    append_result(tmp_path, make("mha"))
    before = results_path(tmp_path).read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(results.os, "fsync", no_space)
        with pytest.raises(OSError, match="No space left"):
            append_result(tmp_path, make("mla"))
    assert results_path(tmp_path).read_bytes() == before


def test_a_result_is_synced_before_it_is_acknowledged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(results.os, "fsync", lambda handle: seen.append(os.fstat(handle).st_size))
    append_result(tmp_path, make("mha"))
    assert seen[0] == results_path(tmp_path).stat().st_size


@pytest.mark.parametrize(
    "line",
    [
        '{"schema_version": 99}',
        '{"schema_version": 1}',
        "[1, 2]",
        "7",
        json.dumps({**vars(make()), "schema_version": 5}),
        json.dumps({**vars(make()), "schema_version": 3, "surprise": 1}),
    ],
)
def test_another_schema_is_one_line_that_says_where(tmp_path: Path, line: str) -> None:
    append_result(tmp_path, make())
    with results_path(tmp_path).open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(
        InputError, match=r"results\.jsonl line 2 is not a result of schema version 1 to 4; it says"
    ) as error:
        read_results(tmp_path)
    assert "\n" not in str(error.value)


LATER = ("eval_block_losses", "flops_per_token", "variant", "busy_cores")


def test_results_of_the_first_schema_have_no_blocks(tmp_path: Path) -> None:
    row = {name: value for name, value in vars(make()).items() if name not in LATER} | {"schema_version": 1}
    results_path(tmp_path).write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert read_results(tmp_path) == [make(eval_block_losses=[], flops_per_token=None)]


def test_results_of_the_second_schema_have_no_variants(tmp_path: Path) -> None:
    row = {name: value for name, value in vars(make()).items() if name not in ("variant", "busy_cores")} | {
        "schema_version": 2
    }
    results_path(tmp_path).write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert read_results(tmp_path) == [make()]


def test_a_folder_without_results_is_one_line(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"holds no results\.jsonl") as error:
            read_results(folder)
        assert "\n" not in str(error.value)


def test_curves_come_back_as_they_were(tmp_path: Path) -> None:
    points = [
        CurvePoint(step=1, tokens=10, seconds=0.5, train_loss=9.0),
        CurvePoint(step=2, tokens=20, seconds=1.0, train_loss=None, eval_loss=8.0),
    ]
    results.write_curve(tmp_path, "mka", 3, points)
    assert results.curve_path(tmp_path, "mka", 3) == tmp_path / "curves" / "mka-seed3.jsonl"
    assert read_curve(tmp_path, "mka", 3) == points
    assert read_curve(tmp_path, "mka", 4) == []


@pytest.mark.parametrize("text", ['{"step": 1', '{"step": 1}\n', "[]\n", '{"unknown": 1}\n'])
def test_a_damaged_curve_is_one_line_that_says_which(tmp_path: Path, text: str) -> None:
    results.write_curve(tmp_path, "mka", 0, [])
    results.curve_path(tmp_path, "mka", 0).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"mka-seed0\.jsonl is damaged") as error:
        read_curve(tmp_path, "mka", 0)
    assert "\n" not in str(error.value)
