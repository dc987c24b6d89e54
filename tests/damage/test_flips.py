"""Flipped bits and cut files: of everything that is written, nothing altered is read in silence."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from checks_training import some_checkpoint
from damage.kinds import Kind, Reading, Whole, checkpoints_of, kinds, read_tokens, table, trial
from mka import cli, storage
from mka.memory import bank
from mka.models.loading import load_model
from mka.record import folders, results
from tiny_runs import Place, end

MANY = 27
"""Flips of each kind of file in the slow tests; a third as many cuts."""


@pytest.fixture(scope="module")
def home(tiny_place: Place) -> Path:
    """A run of two mechanisms, a bank of one of its models, checkpoints and a token cache. Not to
    be changed."""
    home = tiny_place.folder / "home"
    run = (
        "--attention_type",
        "mha",
        "mka",
        "--local_window",
        8,
        "--chunk_size",
        4,
        "--output_dir",
        home / "run",
    )
    assert end(cli.bench, *tiny_place.options, *run).status == 0
    (tiny_place.folder / "note.txt").write_text("def f(x): return x\n")
    add = ("memory", "add", tiny_place.folder / "note.txt", "--bank", home / "bank")
    assert end(cli.main, *add, "--model", home / "run" / "models" / "mka-seed0").status == 0
    whole = Whole(home, tiny_place.corpus)
    for step in (3, 6):
        checkpoints_of(whole).save(some_checkpoint(step))
    read_tokens(whole)
    return home


@pytest.fixture(scope="module")
def all_kinds(home: Path) -> list[Kind]:
    return kinds(load_model(str(home / "run" / "models" / "mka-seed0")))


@pytest.fixture
def whole(home: Path, tiny_place: Place, tmp_path: Path) -> Whole:
    """A copy to be damaged."""
    return Whole(home, tiny_place.corpus).at(tmp_path / "home")


def attack(
    kind: Kind, whole: Whole, flips: int, cuts: int, seed: int
) -> tuple[Counter[str], list[str]]:
    """How many trials ended how, and what was damaged in silence. Before and after, all is well."""
    draw, counts, silent = random.Random(f"{kind.name} {seed}"), Counter[str](), []
    before = kind.read(whole)
    assert before.words == []
    for how in ["flipped"] * flips + ["cut"] * cuts:
        ended, where = trial(kind, whole, "cut" if how == "cut" else "flipped", draw, before)
        counts.update((how, ended))
        silent += [f"{kind.name}: {where}"] if ended == "silent" else []
    assert kind.read(whole) == before
    return counts, silent


def check_nothing_is_silent(
    all_kinds: list[Kind], whole: Whole, flips: int, cuts: int
) -> Counter[str]:
    found = {kind.name: attack(kind, whole, flips, cuts, seed=0) for kind in all_kinds}
    counts = {name: counts for name, (counts, _) in found.items()}
    print(table(counts))
    assert [line for _, silent in found.values() for line in silent] == []
    return sum(counts.values(), Counter())


def test_a_few_of_every_kind(all_kinds: list[Kind], whole: Whole) -> None:
    check_nothing_is_silent(all_kinds, whole, flips=6, cuts=2)


@pytest.mark.slow
def test_many_of_every_kind(all_kinds: list[Kind], whole: Whole) -> None:
    total = check_nothing_is_silent(all_kinds, whole, flips=MANY, cuts=MANY // 3)
    assert total["flipped"] >= 500
    assert total["cut"] >= 150
    assert total["same"] < (total["flipped"] + total["cut"]) / 50


def test_every_file_is_of_a_kind(all_kinds: list[Kind], home: Path) -> None:
    """But for locks and what a report draws; a new file needs a checksum, and a line in `kinds`."""
    known = {path for kind in all_kinds for path in home.glob(kind.path)}
    known |= set((home / "checkpoints" / "mka-seed0" / "step-00000003").iterdir())
    known |= {
        path.parent.parent / path.parent.name.replace("mka", "mha") / path.name for path in known
    }
    drawn = {home / "run" / "table.md", *(home / "run" / "figures").iterdir()}
    files = {path for path in home.rglob("*") if path.is_file() and not path.name.endswith(".lock")}
    assert files - known - drawn == set()


# ---- the same without the checks


class Anything:
    """Equal to everything."""

    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


def believe(value: object) -> Any:
    return Anything()


def believe_file(path: Path, recorded: object) -> str:
    return ""


def believe_manifest(folder: Path) -> Any:
    return json.loads((folder / storage.MANIFEST).read_bytes())["content"]


WITHOUT: dict[str, tuple[tuple[Any, str, Any], ...]] = {
    "run": (
        (folders, "entry_of", believe),
        (folders, "damage_of", believe_file),
        (results, "checksum_of", believe),
    ),
    "model": ((folders, "damage_of", believe_file),),
    "checkpoint": ((storage, "damage_of", believe_file),),
    "tokens": ((storage, "damage_of", believe_file), (storage, "read_manifest", believe_manifest)),
    "bank": (
        (storage, "damage_of", believe_file),
        (storage, "read_manifest", believe_manifest),
        (bank, "checksum_of", believe),
    ),
}
"""What compares a file with its checksum, by what is read."""
NO_VALUES = ("run: manifest", "model: manifest.json", "checkpoint: manifest.json")
"""Nothing that is read comes from these: altered unseen, they make whole files look altered."""
HARD_TO_HIT = ("bank: bank.json", "bank: manifest")
"""Nearly whatever is altered in them, another comparison refuses: of the format, the fingerprint or
the identity."""


def test_without_its_check_every_kind_turns_red(
    all_kinds: list[Kind], whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 40 flips one at least is read as if nothing had been; of a run and of a bank, most are."""
    unnoticed = []
    for kind in all_kinds:
        if kind.name in (*NO_VALUES, *HARD_TO_HIT):
            continue
        with monkeypatch.context() as patch:
            before = kind.read(whole)
            for module, name, instead in WITHOUT[kind.name.partition(":")[0]]:
                patch.setattr(module, name, instead)
            draw = random.Random(kind.name)
            endings = (is_silent(kind, whole, draw, before) for _ in range(40))
            unnoticed += [] if any(endings) else [kind.name]
    assert unnoticed == []


def is_silent(kind: Kind, whole: Whole, draw: random.Random, before: Reading) -> bool:
    """Whether a flipped bit is read as if nothing had been; without the check the libraries see
    some of them."""
    try:
        return trial(kind, whole, "flipped", draw, before)[0] == "silent"
    except Exception:
        return False
