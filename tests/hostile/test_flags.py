"""Every flag of every command with every kind of bad value: one line that names it, exit status 2,
nothing written, nothing that does not end."""

import os
import shlex
import types
from collections.abc import Iterator
from dataclasses import Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from transformers import LlamaConfig

from checks_models import LLAMA, shake
from mka import cli
from mka.cli.commands import COMMANDS
from mka.data import load_tokenizer
from mka.models import build_model

TEXT = "the cat sat on the mat and looked at the dog; the dog looked at the cat. " * 20
RIGHT = {
    "bench": "--preset quick --attention_type mha --dataset text --text_path text.txt "
    "--max_steps 1 --sequence_length 16 --batch_size 1 --output_dir written",
    "report": "run",
    "convert": "--model model --output written",
    "adapt": "--model model --output written --text_path text.txt",
    "verify": "run",
    "generate": "--model model --prompt cat --max_new_tokens 1",
    "chat": "--model model --max_new_tokens 1",
    "memory add": "text.txt --model model --bank written",
    "memory list": "--bank bank",
    "memory verify": "--bank bank",
    "memory remove": "text.txt --bank bank",
    "eval perplexity": "--model model --dataset text --text_path text.txt --max_tokens 16",
    "eval router": "--model model --dataset text --text_path text.txt --length 8 --rows 1",
    "eval needle": "--model model --lengths 32 --depths 0",
    "eval recall": "--model model --shapes 16/2 --samples 1",
    "eval ruler": "--model model",
    "audit original": "--max_steps 1 --sequence_length 8 --dataset text --text_path text.txt",
    "audit module": "mka.attention:MultiHeadAttention --hidden_size 8 --num_heads 2 --tokens 4",
}
"""What each command needs. None of these is run: a bad value is found before."""
LONG, HUGE = "x" * 5000, str(10**30)
NUMBERS = [
    "-1",
    "nan",
    "inf",
    "-inf",
    HUGE,
    f"-{HUGE}",
    "9" * 5000,
    "x",
    "1e400",
    "",
    " ",
    "\u202e1",
]
NAMES = ["", " ", LONG, "/".join(["x"] * 3000)]
PATHS = ["missing", "pipe", "device", "latin1.txt", "empty.txt", "nul.txt"]
NOT_UTF8 = "\udce9"
TAKEN = {("temperature", HUGE), ("learning_rate", HUGE)}
"""Large numbers are allowed there; what follows from them is reported otherwise."""


def kinds_of(kind: Any) -> set[Any]:
    """The plain types within an annotation."""
    if get_origin(kind) is Literal:
        return {Literal}
    inner = [part for part in get_args(kind) if part is not Ellipsis]
    if not inner:
        return {kind}
    if get_origin(kind) not in (types.UnionType, tuple, list) and "Union" not in str(
        get_origin(kind)
    ):
        return kinds_of(inner[0])  # Annotated
    return set().union(*map(kinds_of, inner))


def flags_of(form: Any) -> Iterator[tuple[Field[Any], set[Any]]]:
    from typing import get_type_hints

    hints = get_type_hints(form, include_extras=True)
    for field in fields(form):
        if is_dataclass(hints[field.name]):
            yield from flags_of(hints[field.name])
        else:
            yield field, kinds_of(hints[field.name])


POSITIONAL = {"folders", "folder", "documents", "document", "module"}
FILES = {"prompt_file", "text_path", "deepspeed_config"}
FOLDERS = {"model", "baseline", "bank"}
OUTPUTS = {"html", "markdown"}


def values_for(command: str, name: str, kinds: set[Any]) -> list[str]:
    """Values that an option takes in no case."""
    if bool in kinds:
        return ["maybe", "2", LONG]
    values: list[str] = []
    if int in kinds or float in kinds:
        values += [value for value in NUMBERS if (name, value) not in TAKEN]
    elif Literal in kinds:
        values += ["x", "", LONG, "\u202emha", "-1", HUGE]
    else:
        values += NAMES if name != "prompt" else ["", NOT_UTF8]
        if name == "output_dir" or (name == "output" and command in ("convert", "adapt")):
            values.append(NOT_UTF8)
        if name in FILES:
            values += PATHS
        if name in FOLDERS and not (name == "bank" and command == "memory add"):
            values += ["missing", "pipe", "text.txt", "empty"]
        if name in OUTPUTS or (name == "output" and command.split()[0] in ("eval", "audit")):
            values += ["empty", "text.txt/x", "run/results.jsonl", "run/config.json"]
    return values


def cases() -> list[tuple[str, str, str]]:
    found = []
    for command, row in COMMANDS.items():
        for field, kinds in flags_of(row.form):
            for value in values_for(command, field.name, kinds):
                found.append((command, field.name, value))
    return found


CASES = cases()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, texts, and what is neither."""
    path = tmp_path_factory.mktemp("place")
    tokenizer = load_tokenizer("bpe", [TEXT], 300)
    sizes: dict[str, Any] = LLAMA | {"vocab_size": tokenizer.vocab_size}
    model = build_model(LlamaConfig(**sizes), "mka", local_window=6, chunk_size=3, top_k=2)
    shake(model).save_pretrained(path / "model")
    tokenizer.save(path / "model")
    (path / "text.txt").write_text(TEXT)
    (path / "latin1.txt").write_bytes(b"un caf\xe9")
    (path / "nul.txt").write_bytes(b"a\0b")
    (path / "empty.txt").write_text("")
    (path / "empty").mkdir()
    (path / "run").mkdir()
    for name in ("results.jsonl", "config.json"):
        (path / "run" / name).write_text("{}\n")
    os.mkfifo(path / "pipe")
    (path / "device").symlink_to("/dev/zero")
    return path


def arguments_of(command: str, name: str, value: str) -> list[str]:
    words = shlex.split(RIGHT[command])
    if name in POSITIONAL:
        return [*command.split(), value, *words[1:]]
    if f"--{name}" in words:
        at = words.index(f"--{name}")
        words[at : at + 2] = []
    if name == "prompt_file":
        at = words.index("--prompt")
        words[at : at + 2] = []
    if name == "deepspeed_config":
        words.append("--deepspeed")
    return [*command.split(), *words, f"--{name}", value]


def listing(place: Path) -> set[tuple[str, int]]:
    return {
        (str(path.relative_to(place)), path.lstat().st_mtime_ns)
        for path in place.rglob("*")
        if path.name != ".lock"
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_bad_values(
    place: Path, command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    before = listing(place)
    for _, name, value in (case for case in CASES if case[0] == command):
        capsys.readouterr()
        try:
            status = cli.main(arguments_of(command, name, value))
        except SystemExit as stop:
            status = stop.code
        err = capsys.readouterr().err
        what = f"{command} --{name} {value[:20]!r}: {status} {err[:300]!r}"
        assert status == 2, what
        assert err.count("\n") == 1, what
        assert len(err) <= 301, what
        assert err.startswith("mka: "), what
        assert err[:-1].isprintable(), what
        if name not in POSITIONAL:
            assert name in err or name.removesuffix("s") in err, what
    assert listing(place) == before


def test_there_are_many() -> None:
    assert len(CASES) >= 1000
    assert {command for command, _, _ in CASES} == set(COMMANDS)
    # A flag that no case is for would not be tested.
    for command, row in COMMANDS.items():
        tried = {name for of, name, _ in CASES if of == command}
        assert tried == {field.name for field, _ in flags_of(row.form)}, command
