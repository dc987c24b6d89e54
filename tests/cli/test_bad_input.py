"""Bad input ends in one line with exit status 2, and nothing on disk has changed."""

import errno
import os
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mka import cli
from mka.errors import InputError
from mka.record import results
from mka.record.config import PRESETS, BenchmarkConfig
from tiny_runs import TINY, Place, end, fingerprint, write_corpus

SETTINGS = {
    "--attention_type mak": (
        "unknown attention_type 'mak'; allowed: mha, mqa, gqa, mla, mka, fmka; nearest: 'mka'"
    ),
    "--attention_type mha FMK": "unknown attention_type 'FMK'; .*; nearest: 'fmka'",
    "--attention_type gpa": "nearest: 'gqa'",
    "--preset tinny": (
        "unknown preset 'tinny'; allowed: quick, small, gpt2, tiny, .*; nearest: 'tiny'"
    ),
    "--dataset wikitext-2": "unknown dataset 'wikitext-2'; allowed: .*; nearest: 'wikitext2'",
    "--dataset stdlib": "text_path is '.*' but dataset is 'stdlib'; give --dataset text",
    "--num_groups 3": "num_groups is 3; it must divide the 8 heads: 1, 2, 4, 8",
    "--num_groups 0": "num_groups is 0; it must divide the 8 heads: 1, 2, 4, 8",
    "--preset twelve --num_groups 8": (
        "num_groups is 8; it must divide the 12 heads: 1, 2, 3, 4, 6, 12"
    ),
    "--preset odd": "num_heads is 12; it must divide hidden_size 32: 1, 2, 4, 8, 16, 32",
    "--local_window 0": "local_window is 0; it must be at least 1",
    "--local_window -128": "local_window is -128; it must be at least 1",
    "--local_window 4 --sink_tokens 4": (
        "sink_tokens is 4; local_window is 4; sinks need a window that is larger"
    ),
    "--attention_type mha --sink_tokens 4": (
        "sink_tokens is 4; there is no local_window; sinks need a window"
    ),
    "--sink_tokens -1": "sink_tokens is -1; it must be at least 0",
    "--memory_layers 2 --match parameters": (
        "memory_layers is 2 and match is 'parameters'; sizes can only be matched"
    ),
    "--chunk_size 0": "chunk_size is 0; it must be at least 1",
    "--top_k -1": "top_k is -1; it must be at least 0",
    "--session_decay 2": "session_decay is 2.0; it must be 'learned', None or between 0 and 1",
    "--session_decay 0": "session_decay is 0.0",
    "--session_decay -0.5": "session_decay is -0.5",
    "--session_decay nan": "session_decay is nan",
    "--fp16 --bf16": "--fp16 and --bf16 are both given; choose one",
    "--seeds 0 1 0": r"seeds is \[0, 1, 0\]; give distinct non-negative integers",
    "--seeds -1": r"seeds is \[-1\]",
    "--seeds": r"seeds is \[\]",
    "--sequence_length 0": "sequence_length is 0; it must be at least 1",
    "--batch_size 0": "batch_size is 0; it must be at least 1",
    "--epochs 0": "epochs is 0; it must be at least 1",
    "--max_steps -3": "max_steps is -3; it must be at least 1",
    "--gradient_accumulation_steps 0": "gradient_accumulation_steps is 0; it must be at least 1",
    "--learning_rate nan": "learning_rate is nan; it must be above 0",
    "--learning_rate 0": "learning_rate is 0.0",
    "--learning_rate -1e-4": "learning_rate is -0.0001",
    "--learning_rate inf": "learning_rate is inf",
}
"""Readable words with a value that is not allowed."""

WORDS = {
    "--learning_rat 1": "Unrecognized options: --learning_rat, 1; nearest: --learning_rate",
    "--bach_size 3": "nearest: --batch_size",
    "--attention mka": "nearest: --attention_type",
    "--num_group 4": "nearest: --num_groups",
    "--seed 3": "nearest: --seeds",
    "--window 3": "nearest: --local_window",
    "-x": "Unrecognized options: -x",
    "--fp16 yes": "--fp16 takes no value; given: 'yes'",
    "--batch_size x": "batch_size is 'x'; it must be None or a whole number",
    "--batch_size 1.5": "batch_size is '1.5'; it must be None or a whole number",
    "--learning_rate fast": "learning_rate is 'fast'; it must be None or a number",
    "--session_decay lerned": "session_decay is 'lerned'; it must be None, a number or learned",
    "--seeds a": "seeds is 'a'; it must be None or whole numbers",
    "--match params": "match is 'params'; allowed: auto, none, parameters, flops, cache",
    "--mix jont": "mix is 'jont'; allowed: joint, routed",
    "--longterm_positions tru": ("longterm_positions is 'tru'; allowed: true, clamped, none"),
    "--chunk_size 1e3": "chunk_size is '1e3'; it must be a whole number",
    "--learning_rate": "--learning_rate needs a value",
    "--output_dir": "--output_dir needs a value",
}
"""Words that are not understood."""


@pytest.fixture(autouse=True)
def more_presets(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "twelve", replace(TINY, hidden_size=48, num_attention_heads=12))
    monkeypatch.setitem(PRESETS, "odd", replace(TINY, num_attention_heads=12))


@pytest.fixture
def refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run the command, which must refuse; returns its line. The folder and the token cache are as
    they were."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(place.folder / "cache"))

    def run(*arguments: object, entry: Callable[..., int] = cli.bench) -> str:
        before = fingerprint(place.folder)
        ended = end(entry, *arguments)
        assert fingerprint(place.folder) == before
        assert ended.out == ""
        return ended.complaint

    return run


@pytest.mark.parametrize("words", SETTINGS)
def test_a_setting_that_is_not_allowed(
    place: Place, refused: Callable[..., str], words: str
) -> None:
    line = refused(*place.options, "--output_dir", "run", *words.split())
    assert line.startswith("benchmark.py: ")
    assert_matches(line, SETTINGS[words])


@pytest.mark.parametrize("words", WORDS)
def test_words_that_are_not_understood(
    place: Place, refused: Callable[..., str], words: str
) -> None:
    line = refused(*place.options, *words.split())
    assert_matches(line, WORDS[words])
    assert line.endswith("(--help lists all options)")


def assert_matches(line: str, pattern: str) -> None:
    assert re.search(pattern, line), line


def test_groups_are_gqas_alone(place: Place) -> None:
    """A value that nobody uses is no mistake."""
    assert place.bench("--attention_type", "mqa", "--max_steps", 1, "--num_groups", 3).status == 0


def test_the_presets_of_the_house_take_the_originals_groups() -> None:
    for preset in ("quick", "small"):
        for groups in (4, 8):
            BenchmarkConfig(preset=preset, num_groups=groups).resolved()
    with pytest.raises(InputError, match="1, 2, 3, 4, 6, 12"):
        BenchmarkConfig(preset="gpt2", num_groups=8).resolved()


# ---- corpora


def prepare(folder: Path, kind: str) -> Path:
    path = folder / f"{kind}.txt"
    if kind == "empty":
        path.touch()
    elif kind == "blank":
        path.write_text(" \n\n")
    elif kind == "binary":
        path.write_bytes(b"\x7fELF\0\1\2")
    elif kind == "latin":
        path.write_bytes("naïve".encode("latin-1"))
    elif kind == "broken link":
        path.symlink_to(folder / "nowhere")
    elif kind == "empty folder":
        path.mkdir()
    elif kind == "folder of pictures":
        path.mkdir()
        (path / "a.png").write_bytes(b"\x89PNG\0")
    elif kind == "pipe":
        os.mkfifo(path)
    return path


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("missing", "does not exist"),
        ("broken link", "does not exist"),
        ("empty", "is blank"),
        ("blank", "is blank"),
        ("binary", "holds NUL bytes, so it is not text"),
        ("latin", "is not UTF-8 (byte 2)"),
        ("pipe", "is neither a file nor a folder"),
        ("empty folder", "is a folder without any UTF-8 text"),
        ("folder of pictures", "is a folder without any UTF-8 text"),
    ],
)
def test_a_corpus_that_cannot_be_read(
    place: Place, refused: Callable[..., str], kind: str, reason: str
) -> None:
    path = prepare(place.folder, kind)
    line = refused(
        "--preset",
        "tiny",
        "--dataset",
        "text",
        "--output_dir",
        "run",
        "--text_path",
        place.corpus,
        path,
    )
    assert line.startswith(f"benchmark.py: text_path '{path}' {reason}; give ")


def test_a_file_that_may_not_be_read(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root everything may be read, so the system's answer is played."""

    def denied(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("mka.data.files.Path.read_bytes", denied)
    assert place.bench().complaint == (
        f"benchmark.py: text_path '{place.corpus}' cannot be read: Permission denied; give "
        "UTF-8 text"
    )
    assert list(place.folder.iterdir()) == []


@pytest.mark.parametrize("options", [("--text_path",), ()])
def test_text_without_a_path(refused: Callable[..., str], options: tuple[str, ...]) -> None:
    assert "--dataset text needs --text_path" in refused("--dataset", "text", *options)


@pytest.mark.parametrize(("characters", "length"), [(40, 32), (16_000, 2_000)])
def test_a_corpus_shorter_than_one_block(place: Place, characters: int, length: int) -> None:
    """What is known only after tokenizing may leave an entry in the token cache, and nothing
    else."""
    path = write_corpus(place.folder / "corpus.txt", characters)
    before = fingerprint(place.folder)
    complaint = Place(place.folder, path).bench("--sequence_length", length).complaint
    assert (
        f"one block needs {length + 1}; use a shorter --sequence_length or more text" in complaint
    )
    assert fingerprint(place.folder) == before


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.utils

    def unreachable() -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub.utils, "get_session", unreachable)


@pytest.mark.parametrize(
    ("options", "offline"),
    [
        (
            ["--dataset", "wikitext2"],
            "offline use --dataset stdlib, or --dataset text --text_path FILE",
        ),
        (
            ["--dataset", "wikitext103"],
            "offline use --dataset stdlib, or --dataset text --text_path FILE",
        ),
        (
            ["--tokenizer", "nobody/nothing"],
            "offline use bpe, gpt2, or a folder or file with a tokenizer.json",
        ),
    ],
)
@pytest.mark.usefixtures("no_hub")
def test_a_hub_out_of_reach(
    place: Place,
    refused: Callable[..., str],
    options: list[str],
    offline: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", place.folder / "datasets")
    corpus = [] if "--dataset" in options else ["--dataset", "text", "--text_path", place.corpus]
    line = refused("--preset", "tiny", "--output_dir", "run", *corpus, *options)
    assert "the hub cannot be reached" in line
    assert line.endswith(offline)


# ---- output folders


def test_an_output_folder_that_is_a_file(place: Place) -> None:
    (place.folder / "run").write_text("precious")
    before = fingerprint(place.folder)
    assert f"{place.folder}/run" in place.bench().complaint
    assert f"{place.folder}/run" in place.bench(output="run/below").complaint
    assert fingerprint(place.folder) == before


def test_an_output_folder_that_holds_something_else(place: Place) -> None:
    (place.folder / "run").mkdir()
    (place.folder / "run" / "letter.txt").write_text("precious")
    before = fingerprint(place.folder)
    assert "run is not empty and holds no config.json of a run" in place.bench().complaint
    assert fingerprint(place.folder) == before


def test_an_output_folder_with_another_configuration(place: Place) -> None:
    assert place.bench("--attention_type", "mqa", "--max_steps", 1).status == 0
    before = fingerprint(place.folder)
    complaint = place.bench("--attention_type", "mqa", "--max_steps", 2).complaint
    assert "holds a different configuration: max_steps is 1 there and 2 here" in complaint
    assert fingerprint(place.folder) == before


def no_space(*_: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_keeps_what_is_finished(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is full when the third result is synced."""
    command = ("--attention_type", "mha", "mqa", "gqa", "--max_steps", 1)
    append, kept = results.append_result, []

    def append_until_full(folder: Path, result: results.Result) -> None:
        if result.attention_type != "gqa":
            return append(folder, result)
        kept.append(results.RunFolder(folder).results.read_bytes())
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(results.os, "fsync", no_space)
            return append(folder, result)

    with monkeypatch.context() as patch:
        patch.setattr("mka.experiments.benchmark.append_result", append_until_full)
        complaint = place.bench(*command).complaint
    said = "No space left on device; make room and run the same command again to resume"
    assert said in complaint
    assert (place.folder / "run" / "results.jsonl").read_bytes() == kept[0]
    assert place.keys() == [("mha", 0), ("mqa", 0)]
    assert place.bench(*command).status == 0
    assert place.keys() == [("mha", 0), ("mqa", 0), ("gqa", 0)]


def test_a_full_disk_at_the_start(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("mka.experiments.folder.write_json", no_space)
        assert "No space left on device" in place.bench().complaint
    assert place.bench("--attention_type", "mqa", "--max_steps", 1).status == 0


# ---- mka and mka report


@pytest.mark.parametrize(
    ("words", "pattern"),
    [
        (
            "",
            (
                "Expected one of {bench, report, convert, adapt, verify, generate, chat, memory, "
                "eval, audit}"
            ),
        ),
        ("bnch", "unknown command 'bnch'; .*; nearest: 'bench'"),
        ("bench stray", "Unrecognized options: stray"),
        (
            "--preset quick",
            (
                "--preset is not a command; a command comes first: bench, report, "
                "convert, .*, eval, audit"
            ),
        ),
        ("bench --learning_rat 3", "nearest: --learning_rate"),
        ("bench --attention_type mak", "nearest: 'mka'"),
        ("report", "no folder is given; give one or more folders of `mka bench` runs"),
        ("report nowhere", "nowhere does not exist; give the folder of a `mka bench` run"),
        ("report empty", "empty holds no results.jsonl"),
        ("report torn", r"torn/results\.jsonl holds no finished result yet"),
        ("report foreign", r"foreign/results\.jsonl line 1 is not a result of schema version 1"),
        (
            "report empty more",
            "2 folders are given without a page; add --html FILE or --markdown FILE",
        ),
    ],
)
def test_mka(place: Place, refused: Callable[..., str], words: str, pattern: str) -> None:
    for name, content in {
        "empty": None,
        "torn": '{"schema_ver',
        "foreign": '{"schema_version": 7}\n',
    }.items():
        (place.folder / name).mkdir()
        if content:
            (place.folder / name / "results.jsonl").write_text(content)
    line = refused(*words.split(), entry=cli.main)
    assert line.startswith("mka: ")
    assert_matches(line, pattern)


@pytest.mark.parametrize("columns", ["20", "40", "300"])
def test_a_narrow_terminal_changes_nothing(
    place: Place, refused: Callable[..., str], columns: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    line = refused("--bach_size", "3")
    assert line == (
        "benchmark.py: Unrecognized options: --bach_size, 3; nearest: --batch_size (--help "
        "lists all options)"
    )


# ---- not bad input, but one line as well


LAYER = r"the first layer whose output is not finite is transformer\.[a-z0-9_.]+"


def test_a_training_that_diverges(place: Place) -> None:
    """The status is 1, as nothing was wrong with the words."""
    ended = place.bench("--attention_type", "mha", "--learning_rate", 1e30, "--max_steps", 9)
    assert ended.status == 1
    assert len(ended.err.splitlines()) == 1
    assert_matches(
        ended.err,
        (
            rf"^mka: mha, seed 0: the loss at step \d is (nan|inf); {LAYER}; try a lower "
            r"--learning_rate$"
        ),
    )
    assert "Traceback" not in ended.err
