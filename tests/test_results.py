"""Results are never lost, files are never half-written."""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from disks import full_at, no_space
from mka.errors import InputError
from mka.record import folders, results
from mka.record.results import (
    CurvePoint,
    Result,
    RunFolder,
    append_result,
    read_curve,
    read_results,
)


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
    with RunFolder(tmp_path).results.open("ab") as file:
        file.write(torn)
    assert read_results(tmp_path) == [make("mha")]
    append_result(tmp_path, make("mla"))
    append_result(tmp_path, make("mka"))
    assert read_results(tmp_path) == [make("mha"), make("mla"), make("mka")]


def test_a_last_line_that_lacks_only_its_end_counts(tmp_path: Path) -> None:
    append_result(tmp_path, make("mha"))
    path = RunFolder(tmp_path).results
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    append_result(tmp_path, make("mla"))
    assert read_results(tmp_path) == [make("mha"), make("mla")]


@pytest.mark.parametrize("room", [0, 1, 100])
def test_a_disk_that_fills_up_keeps_the_earlier_rows(tmp_path: Path, room: int) -> None:
    """The write is really cut short, after `room` bytes."""
    append_result(tmp_path, make("mha"))
    before = RunFolder(tmp_path).results.read_bytes()
    with full_at(len(before) + room), pytest.raises(OSError, match="File too large"):
        append_result(tmp_path, make("mla"))
    assert RunFolder(tmp_path).results.read_bytes() == before
    append_result(tmp_path, make("mka"))
    assert read_results(tmp_path) == [make("mha"), make("mka")]


def test_a_sync_that_fails_keeps_the_earlier_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append_result(tmp_path, make("mha"))
    before = RunFolder(tmp_path).results.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(results.os, "fsync", no_space)
        with pytest.raises(OSError, match="No space left"):
            append_result(tmp_path, make("mla"))
    assert RunFolder(tmp_path).results.read_bytes() == before


def test_a_result_is_synced_before_it_is_acknowledged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(results.os, "fsync", lambda handle: seen.append(os.fstat(handle).st_size))
    append_result(tmp_path, make("mha"))
    assert seen[0] == RunFolder(tmp_path).results.stat().st_size


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
    with RunFolder(tmp_path).results.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    with pytest.raises(
        InputError, match=r"results\.jsonl line 2 is not a result of schema version 1 to 4; it says"
    ) as error:
        read_results(tmp_path)
    assert "\n" not in str(error.value)


LATER = ("eval_block_losses", "flops_per_token", "variant", "busy_cores")


def test_results_of_the_first_schema_have_no_blocks(tmp_path: Path) -> None:
    row = {name: value for name, value in vars(make()).items() if name not in LATER} | {
        "schema_version": 1
    }
    RunFolder(tmp_path).results.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert read_results(tmp_path) == [make(eval_block_losses=[], flops_per_token=None)]


def test_results_of_the_second_schema_have_no_variants(tmp_path: Path) -> None:
    row = {
        name: value for name, value in vars(make()).items() if name not in ("variant", "busy_cores")
    } | {"schema_version": 2}
    RunFolder(tmp_path).results.write_text(json.dumps(row) + "\n", encoding="utf-8")
    assert read_results(tmp_path) == [make()]


def test_a_folder_without_results_is_one_line(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=r"holds no results\.jsonl|does not exist") as error:
            read_results(folder)
        assert "\n" not in str(error.value)


def test_curves_come_back_as_they_were(tmp_path: Path) -> None:
    points = [
        CurvePoint(step=1, tokens=10, seconds=0.5, train_loss=9.0),
        CurvePoint(step=2, tokens=20, seconds=1.0, train_loss=None, eval_loss=8.0),
    ]
    results.write_curve(tmp_path, "mka", 3, points)
    assert results.RunFolder(tmp_path).curve("mka", 3) == tmp_path / "curves" / "mka-seed3.jsonl"
    assert read_curve(tmp_path, "mka", 3) == points
    assert read_curve(tmp_path, "mka", 4) == []


@pytest.mark.parametrize("text", ['{"step": 1', '{"step": 1}\n', "[]\n", '{"unknown": 1}\n'])
def test_a_damaged_curve_is_one_line_that_says_which(tmp_path: Path, text: str) -> None:
    results.write_curve(tmp_path, "mka", 0, [])
    results.RunFolder(tmp_path).curve("mka", 0).write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"mka-seed0\.jsonl is damaged") as error:
        read_curve(tmp_path, "mka", 0)
    assert "\n" not in str(error.value)


# ---- checksums


def two_lines(folder: Path) -> Path:
    for kind in ("mha", "mka"):
        append_result(folder, make(kind))
    return RunFolder(folder).results


def test_a_line_says_its_own_checksum_to_any_program(tmp_path: Path) -> None:
    for line in two_lines(tmp_path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        given = row.pop("checksum")
        assert row["schema_version"] == 4
        assert given == hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()


def test_names_that_json_turns_into_text_keep_their_checksum(tmp_path: Path) -> None:
    """10 sorts behind 9, but "10" before "9"."""
    append_result(tmp_path, make(config={9: "a", 10: "b"}))
    assert read_results(tmp_path)[0].config == {"9": "a", "10": "b"}


def read_or_said(folder: Path) -> tuple[list[Result], list[str]] | str:
    """Results and remarks, or the refusal."""
    try:
        return read_results(folder), results.remarks(folder)
    except InputError as error:
        return str(error)


def test_a_flipped_bit_in_any_byte_of_a_line_is_refused_or_said(tmp_path: Path) -> None:
    """Or changes no value, as in the digits of an escaped letter. Which bit of a byte changes from
    byte to byte."""
    path = two_lines(tmp_path)
    raw, before = path.read_bytes(), read_or_said(tmp_path)
    assert before == ([make("mha"), make("mka")], [])
    first = len(raw.split(b"\n")[0])
    same = 0
    for place in range(first + 1):  # the newline is what joins two lines
        changed = bytearray(raw)
        changed[place] ^= 1 << (3 * place) % 8
        path.write_bytes(changed)
        found = read_or_said(tmp_path)
        same += found == before
        assert found == before or isinstance(found, str) or found[1], (
            place,
            changed[place - 9 : place + 9],
        )
    assert same < first / 20, "flips that change nothing are few"


def test_every_place_to_cut_the_file_is_said(tmp_path: Path) -> None:
    """Where a line ends, too: the manifest has the names of the results."""
    folders.note_everything(tmp_path, ())
    path = two_lines(tmp_path)
    raw, before = path.read_bytes(), read_or_said(tmp_path)
    for size in (*range(0, len(raw) - 1, 7), raw.index(b"\n"), raw.index(b"\n") + 1):
        path.write_bytes(raw[:size])
        found = read_or_said(tmp_path)
        assert found != before
        assert isinstance(found, tuple)
        assert "results.jsonl has lost the result of mka-seed0" in found[1]
    path.write_bytes(raw[:-1])
    assert read_or_said(tmp_path) == before, "only the last newline is missing"


def test_a_line_is_held_to_its_checksum_whatever_version_it_claims(tmp_path: Path) -> None:
    path = two_lines(tmp_path)
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    for version in (1, 2, 3, 4, 5, None):
        path.write_text(
            json.dumps(rows[0] | {"schema_version": version, "eval_loss": 1.0}) + "\n",
            encoding="utf-8",
        )
        with pytest.raises(
            InputError, match=r"line 1 is altered: its checksum does not fit; take the line out"
        ):
            read_results(tmp_path)
    for version in (1, 2, 3):  # without one it is what it says
        old = {name: value for name, value in rows[0].items() if name != "checksum"} | {
            "schema_version": version
        }
        path.write_text(json.dumps(old) + "\n", encoding="utf-8")
        assert read_results(tmp_path) == [make("mha")]
    path.write_text(json.dumps(old | {"schema_version": 4}) + "\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"line 1 is altered: it has no checksum"):
        read_results(tmp_path)


def test_a_line_that_is_there_twice_or_gone_is_said(tmp_path: Path) -> None:
    folders.note_everything(tmp_path, ())
    path = two_lines(tmp_path)
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second + first)
    assert results.remarks(tmp_path) == [
        "results.jsonl has the result of mha-seed0 in lines 1 and 3: the last one counts"
    ]
    path.write_bytes(second)
    assert results.remarks(tmp_path) == ["results.jsonl has lost the result of mha-seed0"]
    path.unlink()
    assert results.remarks(tmp_path) == [
        "results.jsonl has lost the result of mha-seed0",
        "results.jsonl has lost the result of mka-seed0",
    ]


def test_two_lines_that_were_joined_are_said(tmp_path: Path) -> None:
    path = two_lines(tmp_path)
    first, second = path.read_bytes().splitlines()
    path.write_bytes(first + b"\x0b" + second + b"\n")
    assert read_results(tmp_path) == []
    assert results.remarks(tmp_path) == ["results.jsonl is cut in line 1: that line was skipped"]


@pytest.mark.parametrize(
    "study", sorted((Path(__file__).parent.parent / "docs" / "study").glob("*.jsonl"))
)
def test_results_of_the_studies_are_read(study: Path, tmp_path: Path) -> None:
    """They are of the third schema, and stay as they are."""
    raw = study.read_bytes()
    assert b'"schema_version": 3' in raw
    RunFolder(tmp_path).results.write_bytes(raw)
    assert len(read_results(tmp_path)) == raw.count(b"\n")
    assert results.remarks(tmp_path) == []
