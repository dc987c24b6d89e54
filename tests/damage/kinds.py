"""Every kind of file that is written and read back, what reads it, and what flips and cuts do to
it.

A trial damages one file of a copy and reads as the commands do. It ends in one of five ways:

    refused    an InputError
    reported   in words, and the reading goes on without it
    rebuilt    in words, with the same values
    same       without a word, and every value is what it was
    silent     without a word, and a value is another one: what must not be
"""

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any, Literal

import torch

from mka.data import load_corpus, prepare_tokens
from mka.errors import InputError
from mka.experiments.folder import agree_with_folder, read_description
from mka.memory.bank import Bank
from mka.memory.options import LongTermConfig
from mka.memory.places import LongTerm
from mka.models import fingerprint, mechanisms
from mka.models.loading import load
from mka.report import read_runs
from mka.training import Checkpoints

Ending = Literal["refused", "reported", "rebuilt", "same", "silent"]
Damage = Literal["flipped", "cut"]
TEXT = "def attend(queries, keys, values): return values"


@dataclass(frozen=True)
class Whole:
    """What is damaged in copies: a run with its models and checkpoints, a token cache, a bank."""

    home: Path
    corpus: Path

    @property
    def run(self) -> Path:
        return self.home / "run"

    def at(self, home: Path) -> "Whole":
        return Whole(shutil.copytree(self.home, home), self.corpus)


@dataclass
class Reading:
    """What was read, in values that compare bit by bit, and what was said meanwhile."""

    values: Any
    words: list[str] = field(default_factory=list)


def read_run(whole: Whole) -> Reading:
    """As `mka report` does, and as `mka bench` does before it goes on."""
    [run] = read_runs([whole.run])
    held = read_description(whole.run)
    assert held is not None
    agreed = agree_with_folder(whole.run, held)
    environment = (
        whole.run / "environment.json"
    ).read_bytes()  # a person reads it, no command does
    values = (
        repr(run.rows),
        repr(run.curves),
        repr(run.costs),
        repr(run.routings),
        agreed,
        environment,
    )
    return Reading(values, run.remarks)


def read_model(whole: Whole) -> Reading:
    """As generate, chat, eval and memory add do."""
    model, tokenizer = load(str(whole.run / "models" / "mka-seed0"))
    weights = {name: values.numpy().tobytes() for name, values in model.state_dict().items()}
    return Reading(
        (
            weights,
            model.config.to_dict(),
            str(tokenizer),
            tokenizer.get_vocab(),
            tokenizer(TEXT).input_ids,
        )
    )


def read_checkpoint(whole: Whole) -> Reading:
    """As a resumed run does."""
    words: list[str] = []
    found = checkpoints_of(whole).newest(words.append)
    if found is None:
        return Reading(None, words)
    tensors = {
        name: values.numpy().tobytes()
        for group in (found.weights, found.optimizer)
        for name, values in group.items()
    }
    return Reading((found.step, tensors, found.progress), words)


def checkpoints_of(whole: Whole) -> Checkpoints:
    return Checkpoints(whole.home / "checkpoints" / "mka-seed0", {"seed": 0})


def read_tokens(whole: Whole) -> Reading:
    """As `mka bench` and `mka eval perplexity` do."""
    said = StringIO()
    with redirect_stderr(said):
        found = prepare_tokens(
            load_corpus("text", (str(whole.corpus),)), "bpe", 300, whole.home / "cache"
        )
    splits = {
        name: (
            split.ids.tobytes(),
            None if split.token_bytes is None else split.token_bytes.tobytes(),
        )
        for name, split in found.splits.items()
    }
    return Reading(
        (splits, found.summary, found.tokenizer.backend.to_str()), said.getvalue().splitlines()
    )


def reader_of_banks(model: Any) -> Callable[[Whole], Reading]:
    """As generate, chat and `mka memory list` do, with the model that the bank is of."""
    whose = fingerprint(model)

    empty = [
        mechanism.initial_state(1, longterm=LongTerm.of(LongTermConfig()))
        for mechanism in mechanisms(model)
    ]

    def read_bank(whole: Whole) -> Reading:
        bank = Bank(whole.home / "bank", whose)
        documents = [(d.name, d.number, d.tokens, d.chunks) for d in bank.documents()]
        layers = [
            (
                layer.chunks,
                {name: values.numpy().tobytes() for name, values in layer.summaries.items()},
                {name: read_all(records, layer.chunks) for name, records in layer.records.items()},
            )
            for layer in bank.layers(empty)
        ]
        return Reading((documents, layers))

    return read_bank


def read_all(records: Any, chunks: int) -> bytes:
    groups = records.form.groups
    chunk, group = (
        torch.arange(chunks).repeat_interleave(groups),
        torch.arange(groups).repeat(chunks),
    )
    return records.read(torch.zeros_like(chunk), chunk, group).numpy().tobytes()


@dataclass(frozen=True)
class Kind:
    """`path`: a pattern below the home of a `Whole`, for one file or several of one kind."""

    name: str
    path: str
    read: Callable[[Whole], Reading]
    rebuilds: bool = False


def kinds(model: Any) -> list[Kind]:
    step, bank = "checkpoints/mka-seed0/step-00000006", reader_of_banks(model)
    run = {
        "config.json": "config.json",
        "environment.json": "environment.json",
        "results.jsonl": "results.jsonl",
        "curve": "curves/*.jsonl",
        "costs.jsonl": "costs.jsonl",
        "routing": "routing/*.json",
        "manifest": "manifest.json",
    }
    saved = (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "manifest.json",
    )
    steps = ("model.safetensors", "optimizer.safetensors", "progress.json", "manifest.json")
    cached = (
        "train.ids",
        "validation.ids",
        "validation.bytes",
        "test.ids",
        "test.bytes",
        "tokenizer.json",
    )
    banked = {"records": "*.[kv]", "summaries": "*.chunk_mean", "manifest": "manifest.json"}
    return [
        *(Kind(f"run: {name}", f"run/{path}", read_run) for name, path in run.items()),
        *(Kind(f"model: {name}", f"run/models/mka-seed0/{name}", read_model) for name in saved),
        *(Kind(f"checkpoint: {name}", f"{step}/{name}", read_checkpoint) for name in steps),
        *(
            Kind(f"tokens: {name}", f"cache/*/{name}", read_tokens, True)
            for name in (*cached, "manifest.json")
        ),
        Kind("bank: bank.json", "bank/bank.json", bank),
        *(Kind(f"bank: {name}", f"bank/documents/*/{path}", bank) for name, path in banked.items()),
    ]


def damage(path: Path, how: Damage, draw: random.Random) -> str:
    """Flip one bit or cut the file at a place; returns which."""
    raw = bytearray(path.read_bytes())
    place, bit = draw.randrange(len(raw)), draw.randrange(8)
    if how == "cut":
        path.write_bytes(raw[:place])
        return f"{path.name} cut to {place} of {len(raw)} bytes"
    raw[place] ^= 1 << bit
    path.write_bytes(raw)
    return (
        f"bit {bit} of byte {place} of {path.name}, now "
        f"{bytes(raw[max(0, place - 12) : place + 12])!r}"
    )


def trial(
    kind: Kind, whole: Whole, how: Damage, draw: random.Random, before: Reading
) -> tuple[Ending, str]:
    """Damage a file of this kind, read, and put everything back. How it ended, and what was
    damaged."""
    path = draw.choice(sorted(whole.home.glob(kind.path)))
    raw, names = path.read_bytes(), {p.name for p in path.parent.iterdir()}
    where = damage(path, how, draw)
    try:
        return ending(kind, before, kind.read(whole)), where
    except InputError:
        return "refused", where
    finally:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(raw)
        assert {p.name for p in path.parent.iterdir()} == names, where


def ending(kind: Kind, before: Reading, found: Reading) -> Ending:
    if found.words != before.words:
        return (
            "rebuilt"
            if kind.rebuilds and found.values == before.values
            else "silent"
            if kind.rebuilds
            else "reported"
        )
    return "same" if found.values == before.values else "silent"


def table(counts: dict[str, Counter[str]]) -> str:
    """Tried and how it ended, for each kind and in all."""
    endings: Iterable[str] = ("refused", "reported", "rebuilt", "same", "silent")
    rows: list[tuple[str, ...]] = [("kind of file", "flips", "cuts", *endings)]
    total: Counter[str] = sum(counts.values(), Counter())
    for name, found in [*counts.items(), ("all", total)]:
        rows.append((name, *(str(found[column]) for column in ("flipped", "cut", *endings))))
    return "\n".join(
        f"{name:<34}" + "".join(f"{cell:>9}" for cell in cells) for name, *cells in rows
    )
