"""Documents of one name in a bank, texts of several names, and what was edited since it was
read."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from disks import files, no_space
from memory_models import save_model, story
from mka import cli
from mka.memory.bank import FORMAT, Bank, identity
from tiny_runs import fingerprint as files_of

OLD, NEW, ELSE = (story(seed, 60) for seed in (1, 2, 3))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and a bank that holds notes.txt with the old text."""
    place = tmp_path_factory.mktemp("names")
    save_model(place / "model", "mka")
    assert cli.main(add(place, write(place, "notes.txt", OLD))) == 0
    return place


@pytest.fixture
def place(saved: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(saved, tmp_path / "place")
    return tmp_path / "place"


def write(place: Path, name: str, text: str) -> Path:
    (place / name).parent.mkdir(exist_ok=True)
    (place / name).write_text(text)
    return place / name


def add(place: Path, *documents: Path, replace: bool = False) -> list[str]:
    words = [
        "memory",
        "add",
        *map(str, documents),
        "--model",
        str(place / "model"),
        "--bank",
        str(place / "bank"),
    ]
    return [*words, *(["--replace"] if replace else [])]


def said(capsys: pytest.CaptureFixture[str], words: list[str]) -> list[str]:
    capsys.readouterr()
    assert cli.main(words) == 0
    return capsys.readouterr().out.splitlines()


def refused(capsys: pytest.CaptureFixture[str], words: list[str]) -> str:
    capsys.readouterr()
    assert cli.main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    return printed.err


def remove(place: Path, document: str) -> list[str]:
    return ["memory", "remove", document, "--bank", str(place / "bank")]


def held(place: Path) -> list[tuple[str, str]]:
    return [(document.name, document.identity) for document in Bank(place / "bank").documents()]


def test_a_name_that_two_documents_have_is_not_enough(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(add(place, write(place, "other/notes.txt", NEW)))
    before = files_of(place)
    line = refused(capsys, remove(place, "notes.txt"))
    both = f"{min(identity(OLD), identity(NEW))}, {max(identity(OLD), identity(NEW))}"
    assert (
        f"has 2 documents named 'notes.txt': {both}; give the identity of the one to remove" in line
    )
    assert files_of(place) == before
    for text, rest in ((NEW, [("notes.txt", identity(OLD))]), (OLD, [])):
        assert said(capsys, remove(place, identity(text))) == [f"removed {identity(text)}"]
        assert held(place) == rest


def test_an_identity_goes_before_a_name(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A document whose name is another one's identity."""
    cli.main(add(place, write(place, identity(OLD), NEW)))
    assert said(capsys, remove(place, identity(OLD))) == [f"removed {identity(OLD)}"]
    assert held(place) == [(identity(OLD), identity(NEW))]
    assert said(capsys, remove(place, identity(OLD))) == [f"removed {identity(NEW)}"]


def test_a_document_that_was_edited_is_said(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = said(capsys, add(place, write(place, "notes.txt", NEW)))
    assert lines[0].startswith(f"{identity(NEW)} notes.txt: ")
    assert lines[1:] == [
        f"notes.txt: another text of this name stays in the bank, {identity(OLD)}; to remove "
        "it: mka memory remove "
        f"{identity(OLD)} --bank {place / 'bank'}, or add with --replace"
    ]
    assert held(place) == [("notes.txt", identity(OLD)), ("notes.txt", identity(NEW))]
    lines = said(capsys, add(place, write(place, "notes.txt", ELSE)))
    assert f"stays in the bank, {identity(OLD)}, {identity(NEW)}; to remove it" in lines[1]


def test_an_edited_document_replaces_what_it_was(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes, more = write(place, "notes.txt", NEW), write(place, "more.txt", ELSE)
    lines = said(capsys, add(place, notes, more, replace=True))
    assert lines[0].startswith(f"{identity(NEW)} notes.txt: ")
    assert lines[1] == f"removed the older notes.txt, {identity(OLD)}"
    assert lines[2].startswith(f"{identity(ELSE)} more.txt: ")
    assert held(place) == [("notes.txt", identity(NEW)), ("more.txt", identity(ELSE))]
    before = files_of(place / "bank")
    assert said(capsys, add(place, notes, more, replace=True)) == [
        f"{name}: already in the bank, nothing to do" for name in ("notes.txt", "more.txt")
    ]
    assert files_of(place / "bank") == before


def test_what_cannot_be_written_replaces_nothing(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = add(place, write(place, "notes.txt", NEW), replace=True)
    monkeypatch.setattr("mka.memory.bank.write_folder", no_space)
    assert "No space left on device" in refused(capsys, words)
    assert held(place) == [("notes.txt", identity(OLD))]


def test_one_of_several_older_ones_is_not_guessed(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(add(place, write(place, "notes.txt", NEW)))
    before = files_of(place / "bank")
    documents = write(place, "first.txt", story(9, 60)), write(place, "notes.txt", ELSE)
    line = refused(capsys, add(place, *documents, replace=True))
    assert "has 2 documents named 'notes.txt': " in line
    assert all(identity(text) in line for text in (OLD, NEW))
    assert files_of(place / "bank") == before, "nothing was added either"


def test_two_new_texts_of_one_name_do_not_replace_each_other(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files_of(place / "bank")
    documents = [
        write(place, f"{folder}/notes.txt", text) for folder, text in (("a", NEW), ("b", ELSE))
    ]
    line = refused(capsys, add(place, *documents, replace=True))
    assert (
        "two texts of one name; with --replace the second would remove the first: rename one"
        in line
    )
    assert files_of(place / "bank") == before
    lines = said(capsys, add(place, *documents))
    assert f"stays in the bank, {identity(OLD)}; " in lines[1]
    assert f"stays in the bank, {identity(OLD)}, {identity(NEW)}; " in lines[3]
    assert len(held(place)) == 3


def test_a_text_under_a_second_name(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is in once, under its first name; with --replace what had the second name goes."""
    cli.main(add(place, write(place, "copy.txt", NEW)))
    known = f"notes.txt: already in the bank as copy.txt, {identity(NEW)}"
    notes = write(place, "notes.txt", NEW)
    first, second = said(capsys, add(place, notes))
    assert first == known
    assert second.startswith(
        f"notes.txt: another text of this name stays in the bank, {identity(OLD)}; "
    )
    assert said(capsys, add(place, notes, replace=True)) == [
        known,
        f"removed the older notes.txt, {identity(OLD)}",
    ]
    assert held(place) == [("copy.txt", identity(NEW))]


def test_killed_while_replacing_both_are_there(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And whole; the same command again ends it."""
    words = add(place, write(place, "notes.txt", NEW), replace=True)
    code = (
        "import os, sys, mka.cli; from mka.memory.bank import Bank\n"
        "Bank.remove = lambda *_: os.kill(os.getpid(), 9)\n"
        "sys.exit(mka.cli.main(sys.argv[1:]))"
    )
    ended = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert held(place) == [("notes.txt", identity(OLD)), ("notes.txt", identity(NEW))]
    assert said(capsys, words)[1:] == [f"removed the older notes.txt, {identity(OLD)}"]
    assert held(place) == [("notes.txt", identity(NEW))]


class Stopped(BaseException):
    """Nothing in the program catches it: what is on the disk stays as it is."""


@pytest.mark.parametrize("at", ["os.replace", "sync_folder", "shutil.rmtree"])
def test_stopped_while_a_document_is_taken_out(
    at: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is there, whole, or gone; what is left of it is swept by who writes next."""

    def stop(*_: object) -> None:
        raise Stopped

    bank, other = Bank(place / "bank"), identity(NEW)
    cli.main(add(place, write(place, "more.txt", NEW)))
    with monkeypatch.context() as patch:
        patch.setattr(f"mka.memory.bank.{at}", stop)
        with pytest.raises(Stopped):
            bank.remove(other)
    left = {"notes.txt": identity(OLD)} | ({"more.txt": other} if at == "os.replace" else {})
    assert held(place) == [*left.items()]
    assert [damage for _, _, damage in bank.checked() if damage] == []
    with bank.writing():
        assert files(place / "bank" / "documents") <= {
            identity(OLD),
            other,
            f".{identity(OLD)}.lock",
            f".{other}.lock",
        }


@pytest.mark.parametrize("command", ["add", "list", "verify", "remove", "generate"])
def test_a_bank_of_another_format_is_to_be_made_anew(
    command: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = place / "bank" / "bank.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 1}))
    before, bank = files_of(place), ["--bank", str(place / "bank")]
    words = {
        "add": add(place, place / "notes.txt"),
        "remove": remove(place, "notes.txt"),
        "generate": ["generate", "--model", str(place / "model"), "--prompt", "a", *bank],
    }
    line = refused(capsys, words.get(command, ["memory", command, *bank]))
    assert (
        f"of format 1; this version reads {FORMAT}; recreate the bank from its documents, "
        "in another folder"
    ) in line
    assert files_of(place) == before
