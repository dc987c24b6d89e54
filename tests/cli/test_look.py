"""What a run prints: the original's look, so that its readers feel at home, then what it lacked,
then one table."""

import io
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mka import cli
from mka.record.mechanisms import MECHANISMS
from tiny_runs import BENCHMARK_SCRIPT, Ended, Place, end, fingerprint

LABELS = [
    "Train Loss",
    "Eval Loss",
    "Perplexity",
    "Train Time",
    "Eval Time",
    "Memory Allocated",
    "Memory Reserved",
    "Bits per Byte",
    "Tokens per Second",
    "Parameters",
    "Cache Bytes per Token",
]


@pytest.fixture(scope="module")
def six(tiny_place: Place) -> Ended:
    ended = tiny_place.bench()
    assert (ended.status, ended.err) == (0, "")
    return ended


def part(out: str, kind: str) -> list[str]:
    """The lines of one mechanism."""
    return out.partition(f"🏁 Testing {kind.upper()}...\n")[2].partition("\n\n")[0].splitlines()


@pytest.mark.parametrize("kind", MECHANISMS)
def test_each_mechanism_looks_as_in_the_original(six: Ended, kind: str) -> None:
    lines = part(six.out, kind)
    assert lines[0] == f"Using {MECHANISMS[kind].title}"
    start = lines.index(f"📊 Results for {kind.upper()}:")
    assert all(line.startswith("  step ") for line in lines[1:start])
    assert [line.partition(":")[0] for line in lines[start + 1 :]] == [
        f"  {label}" for label in LABELS
    ]


def test_the_originals_words(six: Ended) -> None:
    assert "\n🏁 Testing MKA...\nUsing Memorized Key Attention\n" in six.out
    assert "\n📊 Results for MKA:\n  Train Loss: " in six.out


def test_printed_numbers_are_the_rows(six: Ended, tiny_place: Place) -> None:
    for row in tiny_place.rows():
        printed = dict(
            line.strip().split(": ")
            for line in part(six.out, row["attention_type"])[-len(LABELS) :]
        )
        assert printed["Train Loss"] == f"{row['train_loss']:.4f}"
        assert printed["Eval Loss"] == f"{row['eval_loss']:.4f}"
        assert printed["Perplexity"] == f"{row['perplexity']:.2f}"
        assert printed["Bits per Byte"] == f"{row['bits_per_byte']:.4f}"
        assert printed["Parameters"] == f"{row['parameters']:,}"
        assert printed["Cache Bytes per Token"] == f"{row['cache_bytes_per_token']:,.0f}"


def test_what_is_printed_first(six: Ended, tiny_place: Place) -> None:
    corpus, split, budget, machine, results, empty = six.out.splitlines()[:6]
    assert re.fullmatch(r"Corpus     text: [\d,]+ training tokens, [\d,]+ held out", corpus)
    assert split.endswith("; 0 files skipped (empty or not text)")
    assert budget == "Budget     3 steps, 192 tokens for each mechanism and seed"
    assert re.fullmatch(r"Machine    .+, \d+ threads, (float32|bfloat16)", machine)
    assert results == f"Results    {tiny_place.folder}/run"
    assert empty == ""


def test_one_table_at_the_end(six: Ended, tiny_place: Place) -> None:
    end_of_runs = six.out.rindex("Cache Bytes per Token:")
    tail = six.out[end_of_runs:].splitlines()
    rows = [
        line.split()[0]
        for line in tail
        if line.startswith(" ") and line.split() and line.split()[0].isupper()
    ]
    assert rows == [kind.upper() for kind in MECHANISMS]
    assert six.out.count("Perplex-") == 1
    folder = tiny_place.folder / "run"
    assert tail[-2] == f"Results  {folder}/results.jsonl"
    written = [folder / "table.md", *(folder / "figures" / f"{name}.svg" for name in FIGURES)]
    assert tail[-1] == f"Report   {', '.join(map(str, written))}"
    assert all(path.is_file() for path in written)


FIGURES = ("loss_tokens", "loss_time", "perplexity_cache")


def test_no_line_of_the_table_is_too_long(six: Ended) -> None:
    assert all(
        len(line) <= 110 for line in six.out[six.out.rindex("Cache Bytes") :].splitlines()[:-2]
    )


def test_plain_output_has_no_control_characters(six: Ended) -> None:
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", six.out)


# ---- mka report


def test_report_redraws_the_same_table_and_figures(
    six: Ended, tiny_place: Place, tmp_path: Path
) -> None:
    folder = tiny_place.folder / "run"
    before = fingerprint(folder)
    for path in [folder / "table.md", *(folder / "figures").iterdir()]:
        path.unlink()
    ended = end(cli.main, "report", folder)
    assert (ended.status, ended.err) == (0, "")
    assert fingerprint(folder) == before
    assert ended.out.strip() in six.out


def test_report_needs_no_torch(six: Ended, tiny_place: Place) -> None:
    code = (
        "import sys; from mka.cli import main; status = main(sys.argv[1:]);"
        "sys.exit(status or 'torch' in sys.modules or 'transformers' in sys.modules)"
    )
    command = [sys.executable, "-c", code, "report", str(tiny_place.folder / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "FMKA" in done.stdout


# ---- help


@pytest.mark.parametrize(
    ("entry", "words"),
    [(cli.bench, "--help"), (cli.main, "bench --help"), (cli.main, "report --help")],
)
def test_help(
    entry: Callable[[list[str]], int], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        entry(words.split())
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    if "report" in words:
        assert "Folders of `mka bench` runs" in shown
        return
    flags = """
        attention_type num_groups batch_size epochs gradient_accumulation_steps learning_rate fp16
        preset dataset text_path tokenizer sequence_length max_steps seeds output_dir
        local_window chunk_size top_k session_decay match bf16
    """
    for flag in flags.split():
        assert re.search(rf"--{flag}\b", shown), flag


# ---- the real commands


def run(*command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *map(str, command)]
    return subprocess.run(
        words, capture_output=True, text=True, check=False, env=os.environ | environment
    )


def test_the_script_and_the_console_command_refuse_alike(tmp_path: Path) -> None:
    script = run(BENCHMARK_SCRIPT, "--attention_type", "mak")
    module = run("-m", "mka", "bench", "--attention_type", "mak")
    assert (script.returncode, module.returncode) == (2, 2)
    assert (script.stdout, module.stdout) == ("", "")
    assert script.stderr.partition(": ")[2] == module.stderr.partition(": ")[2]
    assert script.stderr.startswith("benchmark.py: unknown attention_type 'mak'")
    assert module.stderr.startswith("mka: ")


def test_on_a_terminal_a_complaint_is_one_plain_line() -> None:
    """There the parser draws colored boxes."""
    ours, theirs = pty.openpty()
    try:
        command = [sys.executable, "-m", "mka", "bench", "--bach_size", "3"]
        environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "60"}
        done = subprocess.run(
            command, stdout=theirs, stderr=theirs, stdin=theirs, env=environment, check=False
        )
        shown = os.read(ours, 10_000).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 2
    assert shown == (
        "mka: Unrecognized options: --bach_size, 3; nearest: --batch_size (--help lists all "
        "options)\r\n"
    )


def test_a_run_on_a_terminal_has_a_bar(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    words = [*place.options, "--output_dir", place.folder / "run", "--attention_type", "mha"]
    assert cli.bench([str(word) for word in words]) == 0
    shown = re.sub(r"\x1b\[[0-9?;]*[a-zA-Z]", "", terminal.getvalue())
    assert re.search(r"Training ━+ 3/3 loss \d\.\d{3}  [\d,]+ tokens/s", shown)
    assert "  step 3/3" not in shown
    assert "📊 Results for MHA:\n  Train Loss: " in shown
