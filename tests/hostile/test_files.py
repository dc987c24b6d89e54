"""Files that are not what they should be: JSON of other types, pipes, devices, loops of links. Each
ends in one line."""

import copy
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from mka import cli
from mka.cli.output import complain
from mka.errors import InputError
from mka.memory.bank import Bank
from mka.record.folders import manifest_of
from mka.record.results import RunFolder, read_results
from mka.report.facts import escape
from mka.report.page import render, report_text
from mka.report.runs import read_run
from mka.storage import checksum_of, manifest_text
from tiny_runs import Place, finished_run

DEEP = "[" * 100_000
MISSING = object()
VALUES: dict[str, Any] = {
    "missing": MISSING,
    "null": None,
    "word": "x",
    "no word": "",
    "markup": "[/x]<b>|`](javascript:1)",
    "way out": "../../x",
    "lines": "a\nb\x1b[31m\u202e",
    "below 0": -1,
    "zero": 0,
    "yes": True,
    "fraction": 1.5,
    "list": [],
    "nested list": [[[]]],
    "object": {},
    "128 bits": 10**30,
    "NaN": float("nan"),
    "infinity": float("inf"),
    "half a pair": "\ud800",
}
RAW = {
    "empty": b"",
    "cut": b'{"name": "m',
    "deep": DEEP.encode(),
    "deep object": b'{"a":' * 50_000,
    "long number": b"9" * 10_000,
    "not UTF-8": b"\xff\xfe\x00",
    "NUL": b"\0" * 100,
    "number": b"3",
    "null": b"null",
    "text": b"hello",
}
WRONG_TYPE = ("word", "list", "object", "yes", "null")
"""Of these, a field of a number takes none."""


@pytest.fixture(scope="module")
def run(tiny_place: Place) -> Path:
    """A run whose files have no checksums, so that what is in them is looked at."""
    folder = finished_run(tiny_place, "--attention_type", "mha", "mka")
    copied = folder.parent / "plain"
    shutil.copytree(folder, copied)
    (copied / "manifest.json").unlink()
    rows = [asdict(row) | {"schema_version": 3} for row in read_results(folder)]
    write_rows(copied, rows)
    return copied


def write_rows(folder: Path, rows: list[Any]) -> None:
    RunFolder(folder).results.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(autouse=True)
def here(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short paths, as in a terminal."""
    monkeypatch.chdir(run.parent)


@pytest.fixture
def restored(run: Path, tmp_path: Path) -> Iterator[Path]:
    """The run, which is as before afterward."""
    shutil.copytree(run, tmp_path / "kept")
    yield Path(run.name)
    shutil.rmtree(run)
    shutil.copytree(tmp_path / "kept", run)


def survives(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The message of the report, which is one line; "" if it can be written."""
    try:
        found = read_run(folder, folder.name)
        for text in (report_text(found.rows), render([found], "page.md")):
            assert "\x1b" not in text
            assert "<b>" not in text
        return ""
    except InputError as error:
        capsys.readouterr()
        complain("mka", error, 2)
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        assert 0 < len(line) <= 300
        assert line.isprintable() or line[:-1].isprintable()
        return line


def changed(value: Any, name: str, new: Any) -> Any:
    value = copy.deepcopy(value)
    if new is MISSING:
        del value[name]
    else:
        value[name] = new
    return value


Change = Callable[[Path, Any], None]
PLACES: dict[str, tuple[Callable[[RunFolder], Path], bool]] = {
    "results": (lambda run: run.results, True),
    "curve": (lambda run: run.curve("mka", 0), True),
    "costs": (lambda run: run.costs, True),
    "routing": (lambda run: run.routing("mka", 0), False),
}
NUMBERS = {
    "results": ("seed", "train_loss", "parameters", "eval_tokens", "cache_bytes_per_token"),
    "curve": ("step", "tokens", "seconds"),
    "costs": ("tokens", "milliseconds", "state_bytes"),
    "routing": ("seed",),
}


@pytest.mark.parametrize("kind", PLACES)
def test_a_field_of_another_type(
    restored: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    place, is_lines = PLACES[kind]
    path = place(RunFolder(restored))
    lines = path.read_text().splitlines() if is_lines else [path.read_text()]
    last, count, refused = json.loads(lines[-1]), 0, set()
    for field in last:
        for name, value in VALUES.items():
            path.write_text(
                "\n".join([*lines[:-1], json.dumps(changed(last, field, value))]) + "\n"
            )
            count += 1
            if message := survives(restored, capsys):
                refused.add((field, name))
                assert path.name in message or "unknown attention_type" in message
    assert count == len(last) * len(VALUES)
    missing = {(field, name) for field in NUMBERS[kind] for name in WRONG_TYPE} - refused
    assert missing <= {("train_loss", "null")}, "a training that diverged has no loss"


@pytest.mark.parametrize("kind", PLACES)
def test_an_element_of_another_type(
    restored: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    place, is_lines = PLACES[kind]
    path = place(RunFolder(restored))
    lines = path.read_text().splitlines() if is_lines else [path.read_text()]
    last = json.loads(lines[-1])
    lists = [field for field, value in last.items() if isinstance(value, list) and value]
    for field in lists:
        for value in (*VALUES.values(), [1, 2], [[1, 2, 3, 4]]):
            if value is not MISSING:
                new = [*last[field][:-1], value]
                row = json.dumps(changed(last, field, new))
                path.write_text("\n".join([*lines[:-1], row]) + "\n")
                survives(restored, capsys)
        path.write_text(
            "\n".join([*lines[:-1], json.dumps(changed(last, field, last[field][:-1]))])
        )
        survives(restored, capsys)


@pytest.mark.parametrize("field", ["config", "environment"])
def test_settings_and_environments_of_any_kind(
    restored: Path, capsys: pytest.CaptureFixture[str], field: str
) -> None:
    rows = [json.loads(line) for line in RunFolder(restored).results.read_text().splitlines()]
    for name in rows[-1][field]:
        for value in VALUES.values():
            write_rows(
                restored,
                [*rows[:-1], changed(rows[-1], field, changed(rows[-1][field], name, value))],
            )
            survives(restored, capsys)
    hostile = {"\x1b[31m": 1, "<b>": "<b>", "a|b": "c|d"}
    write_rows(restored, [*rows[:-1], rows[-1] | {field: hostile}])
    assert not survives(restored, capsys)


@pytest.mark.parametrize("raw", RAW)
@pytest.mark.parametrize(
    "name",
    [
        "results.jsonl",
        "curves/mka-seed0.jsonl",
        "costs.jsonl",
        "routing/mka-seed0.json",
        "manifest.json",
        "config.json",
        "environment.json",
    ],
)
def test_bytes_that_are_no_json(
    restored: Path, capsys: pytest.CaptureFixture[str], name: str, raw: str
) -> None:
    (restored / name).write_bytes(RAW[raw])
    survives(restored, capsys)
    capsys.readouterr()
    assert cli.main(["verify", str(restored)]) in (0, 1, 2)
    assert capsys.readouterr().err.count("\n") <= 1


def pipe(path: Path) -> None:
    os.mkfifo(path)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def folder_there(path: Path) -> None:
    path.mkdir()


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


KINDS = [pipe, device, loop, folder_there, listening]


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize(
    "name",
    [
        "results.jsonl",
        "curves/mka-seed0.jsonl",
        "costs.jsonl",
        "routing/mka-seed0.json",
        "manifest.json",
    ],
)
@pytest.mark.parametrize("command", ["report", "verify"])
def test_what_is_no_file_is_not_read(
    restored: Path, capsys: pytest.CaptureFixture[str], command: str, name: str, make: Any
) -> None:
    (restored / name).unlink(missing_ok=True)
    make(restored / name)
    capsys.readouterr()
    status = cli.main([command, str(restored)])
    err = capsys.readouterr().err
    assert "Traceback" not in err
    assert err.count("\n") <= 1
    if command == "report":
        assert status == 2
        assert err.startswith("mka: ")


SIGNED = {
    "details a list": lambda content: content.update(details=[]),
    "files a list": lambda content: content.update(files=[]),
    "a file is null": lambda content: content["files"].update({"config.json": None}),
    "size a word": lambda content: content["files"]["config.json"].update(size="1"),
    "size below 0": lambda content: content["files"]["config.json"].update(size=-1),
    "no sha256": lambda content: content["files"]["config.json"].pop("sha256"),
    "sha256 a number": lambda content: content["files"]["config.json"].update(sha256=1),
    "outside": lambda content: content["files"].update({"../x": content["files"]["config.json"]}),
    "absolute": lambda content: content["files"].update(
        {"/etc/x": content["files"]["config.json"]}
    ),
    "no name": lambda content: content["files"].update({"": content["files"]["config.json"]}),
    "results numbers": lambda content: content["details"].update(results=[1]),
    "results a word": lambda content: content["details"].update(results="mka"),
    "pending null": lambda content: content.update(pending=None),
}
"""Contents with a right checksum."""


@pytest.mark.parametrize("name", SIGNED)
def test_a_manifest_with_a_right_checksum(
    tiny_place: Place, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    run = finished_run(tiny_place, "--attention_type", "mha", "mka")
    shutil.copytree(run, tmp_path / "run")
    content = manifest_of(tmp_path / "run")
    assert content is not None
    SIGNED[name](content)
    (tmp_path / "run" / "manifest.json").write_text(manifest_text(content))
    for command in ("report", "verify"):
        capsys.readouterr()
        status = cli.main([command, str(tmp_path / "run")])
        assert status == (2 if command == "report" else 1)
        assert capsys.readouterr().err.count("\n") <= 1


BANKS = {
    **{f"format {name}": {"format": value, "fingerprint": "a"} for name, value in VALUES.items()},
    **{f"print {name}": {"format": 2, "fingerprint": value} for name, value in VALUES.items()},
}


def test_the_facts_of_a_bank_of_another_type(tmp_path: Path) -> None:
    for name, info in BANKS.items():
        held = {key: value for key, value in info.items() if value is not MISSING}
        text = json.dumps(held | {"sha256": checksum_of(held)})
        (tmp_path / "bank.json").write_text(text)
        if name in ("print word", "print no word", "print markup", "print way out", "print lines"):
            assert Bank(tmp_path).info["fingerprint"] == info["fingerprint"]
            continue
        if name == "print half a pair":
            continue
        with pytest.raises(InputError, match="bank is "):
            Bank(tmp_path)


@pytest.mark.parametrize("raw", RAW)
def test_a_bank_that_is_no_json(tmp_path: Path, raw: str) -> None:
    (tmp_path / "bank.json").write_bytes(RAW[raw])
    with pytest.raises(InputError, match=r"its bank\.json is corrupt"):
        Bank(tmp_path)


@pytest.mark.parametrize("make", KINDS)
def test_a_bank_that_is_no_file(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "bank.json")
    with pytest.raises(InputError, match=r"it is not a bank: bank\.json: "):
        Bank(tmp_path)


def test_what_markdown_would_obey_is_escaped() -> None:
    assert escape("a | b") == "a \\| b"
    assert escape("<script>") == "&lt;script>"
    assert escape("[x](javascript:1)") == "[x\\](javascript:1)"
    assert escape("`code` \\| ") == "\\`code\\` \\\\\\|"
    assert escape("a\n# b\x1b[0m\u202e") == "a # b\\x1b[0m\\u202e"
