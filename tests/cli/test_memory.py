"""mka memory and mka generate --bank: read once, remembered by other processes, whole or not
there."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from disks import files, full_at
from memory_models import save_model, story
from mka import cli
from mka.memory.bank import Bank
from mka.models import fingerprint, memory_cache
from mka.storage import locked
from tiny_runs import fingerprint as fingerprint_of_files


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of three mechanisms, and a bank of one with two books."""
    place = tmp_path_factory.mktemp("memory")
    for kind in ("mka", "fmka", "mha"):
        save_model(place / kind, kind)
    for number in range(3):
        (place / f"book{number}.txt").write_text(story(number))
    books = [str(place / f"book{number}.txt") for number in (0, 1)]
    assert (
        cli.main(
            ["memory", "add", *books, "--model", str(place / "mka"), "--bank", str(place / "bank")]
        )
        == 0
    )
    return place


@pytest.fixture
def bank(saved: Path, tmp_path: Path) -> Path:
    """A copy of the bank that a test may harm."""
    shutil.copytree(saved / "bank", tmp_path / "bank")
    return tmp_path / "bank"


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    status, out, err = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    return err


def test_list_and_verify(bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, _ = run(capsys, "memory", "list", "--bank", bank)
    documents = Bank(bank).documents()
    lines = [
        (
            f"{d.folder.name} {d.name}: {d.tokens:,} tokens, {d.tokens // 4:,} chunks, "
            f"{d.nbytes / 2**20:.1f} MiB\n"
        )
        for d in documents
    ]
    chunks, size = sum(d.chunks for d in documents), sum(d.nbytes for d in documents)
    assert (status, out) == (
        0,
        f"{''.join(lines)}2 documents, {chunks:,} chunks, {size / 2**20:.1f} MiB\n",
    )
    assert [d.name for d in documents] == ["book0.txt", "book1.txt"]
    status, out, _ = run(capsys, "memory", "verify", "--bank", bank)
    assert (status, out.count(": whole")) == (0, 2)


def test_the_same_document_twice_is_noticed(
    saved: Path, bank: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = fingerprint_of_files(bank)
    (bank.parent / "other name.txt").write_text(story(0))
    status, out, _ = run(
        capsys,
        "memory",
        "add",
        bank.parent / "other name.txt",
        "--model",
        saved / "mka",
        "--bank",
        bank,
    )
    known = Bank(bank).documents()[0].identity
    assert (status, out) == (0, f"other name.txt: already in the bank as book0.txt, {known}\n")
    assert fingerprint_of_files(bank) == before


def test_generate_in_another_process_sees_the_bank(saved: Path, bank: Path) -> None:
    """It says what the model with that bank says here, which is not what it says without."""
    model: Any = AutoModelForCausalLM.from_pretrained(saved / "mka").eval()
    tokenizer = AutoTokenizer.from_pretrained(saved / "mka")
    row = tokenizer("the cat", return_tensors="pt").input_ids

    def said(cache: object) -> str:
        given = model.generate(
            row, past_key_values=cache, max_new_tokens=12, do_sample=False, eos_token_id=None
        )
        return tokenizer.decode(given[0, row.shape[1] :])

    with_bank, without = said(memory_cache(model, bank=Bank(bank, fingerprint(model)))), said(None)
    assert with_bank != without
    command = [
        sys.executable,
        "-m",
        "mka",
        "generate",
        "--model",
        saved / "mka",
        "--prompt",
        "the cat",
    ]
    command += [
        "--max_new_tokens",
        "12",
        "--show_memory",
        "--bank",
        bank,
        "--longterm_store",
        "disk",
    ]
    ended = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    assert ended.stdout.startswith(with_bank.split("<|")[0][:20])
    assert "long-term memory on disk; bank: " in ended.stdout


@pytest.mark.parametrize("store", ["host", "disk"])
@pytest.mark.parametrize("piece", [[], ["--prefill_chunk_size", "5"]])
def test_generate_says_the_same_wherever_memory_is(
    saved: Path, store: str, piece: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    common = [
        "generate",
        "--model",
        saved / "mka",
        "--prompt",
        story(7, 60),
        "--max_new_tokens",
        "8",
    ]
    assert run(capsys, *common, *piece, "--longterm_store", store)[1] == run(capsys, *common)[1]


def test_remove(bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = Bank(bank).documents()[0].folder.name
    status, out, _ = run(capsys, "memory", "remove", "book0.txt", "--bank", bank)
    assert (status, out) == (0, f"removed {name}\n")
    assert [document.name for document in Bank(bank).documents()] == ["book1.txt"]
    assert "has no document 'book0.txt'; there are: " in refused(
        capsys, "memory", "remove", "book0.txt", "--bank", bank
    )


@pytest.mark.parametrize("harm", ["flipped", "truncated", "missing", "manifest"])
def test_a_damaged_document_is_named(
    harm: str, saved: Path, bank: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By every command; it can be removed, and the rest is as it was."""
    folder = Bank(bank).documents()[1].folder
    file = folder / ("manifest.json" if harm == "manifest" else "001.v")
    raw = bytearray(file.read_bytes())
    raw[len(raw) // 2] ^= 1
    if harm == "missing":
        file.unlink()
    else:
        file.write_bytes(raw[:-1] if harm == "truncated" else raw)
    status, out, _ = run(capsys, "memory", "verify", "--bank", bank)
    assert status == 1
    assert out.count(": whole") == 1
    assert f"{folder.name}: damaged, {file.name} " in out
    for command in (
        ["memory", "list"],
        ["generate", "--model", saved / "mka", "--prompt", "a"],
        ["memory", "add", saved / "book2.txt", "--model", saved / "mka"],
    ):
        line = refused(capsys, *command, "--bank", bank)
        assert f"its document {folder.name} is damaged: {file.name} " in line
        assert f"mka memory remove {folder.name}" in line
    assert run(capsys, "memory", "remove", folder.name, "--bank", bank)[0] == 0
    assert [document.name for document in Bank(bank).documents()] == ["book0.txt"]


BAD: dict[str, str] = {
    "memory list --bank none": "it is not a bank: bank.json: No such file or directory",
    "memory add BOOK --model MKA --bank FULL": "it exists but is not a bank",
    "memory add none.txt --model MKA --bank BANK": (
        "document 'none.txt' does not exist; give a file of UTF-8 text"
    ),
    "memory add BOOK --model MHA --bank BANK": "it retrieves nothing; a bank needs a model of mka",
    "memory add BOOK --model FMKA --bank BANK": "not interchangeable between models",
    "memory add BOOK --model MKA --bank BANK --piece 0": "piece is 0; it must be at least 1",
    "memory add --model MKA --bank BANK": "no document is given",
    "memory lost --bank BANK": "lost",
    "memory list --bnk BANK": "--bank",
    "memory list --bank BANK --bankk 2": "nearest: --bank",
    "generate --model FMKA --prompt a --bank BANK": "not interchangeable between models",
    "generate --model MHA --prompt a --longterm_store disk": (
        "retrieves nothing; allowed: longterm_store device"
    ),
    "generate --model MKA --prompt a --longterm_store disc": "disc",
    "generate --model MKA --prompt a --longterm_gib 1": (
        "longterm_gib is 1.0; it is for longterm_store host or disk"
    ),
    "generate --model MKA --prompt a --longterm_folder x": (
        "longterm_folder is 'x'; it is for longterm_store disk"
    ),
    (
        "generate --model MKA --prompt a --longterm_store host --longterm_gib 0"
    ): "longterm_gib is 0.0; it must be above 0",
    (
        "generate --model MKA --prompt a --longterm_store disk --longterm_folder none"
    ): "longterm_folder is 'none'",
}


@pytest.mark.parametrize("command", BAD)
def test_bad_input(
    command: str,
    saved: Path,
    bank: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(bank.parent)
    (bank.parent / "full").mkdir()
    (bank.parent / "full" / "mine").touch()
    before = fingerprint_of_files(bank.parent)
    places = {"BANK": bank, "BOOK": saved / "book2.txt", "FULL": bank.parent / "full"}
    places |= {kind.upper(): saved / kind for kind in ("mka", "fmka", "mha")}
    line = refused(capsys, *(places.get(word, word) for word in command.split()))
    assert BAD[command] in line
    assert fingerprint_of_files(bank.parent) == before


def test_a_full_disk_leaves_the_bank_as_it_was(
    saved: Path, bank: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = fingerprint_of_files(bank)
    add = ["memory", "add", saved / "book2.txt", "--model", saved / "mka", "--bank", bank]
    for size in (3000, 30000):
        with full_at(size):
            assert "File too large" in refused(capsys, *add)
        assert fingerprint_of_files(bank) == before
    assert run(capsys, *add)[0] == 0


def test_a_read_only_bank_is_read_and_not_written(
    saved: Path, bank: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As on a disk that is mounted for reading."""
    real = os.open

    def read_only(path: str, flags: int, *more: int, **given: object) -> int:
        if str(path).startswith(str(bank)) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(30, "Read-only file system", str(path))
        return real(path, flags, *more, **given)  # pyright: ignore

    before = fingerprint_of_files(bank)
    monkeypatch.setattr(os, "open", read_only)
    monkeypatch.setattr("tempfile._os.open", read_only)
    line = refused(
        capsys, "memory", "add", saved / "book2.txt", "--model", saved / "mka", "--bank", bank
    )
    assert "Read-only file system" in line
    assert fingerprint_of_files(bank) == before
    assert (
        run(capsys, "generate", "--model", saved / "mka", "--prompt", "a cat", "--bank", bank)[0]
        == 0
    )


def test_two_writers(saved: Path, bank: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = fingerprint_of_files(bank)
    with locked(bank / ".lock"):
        for command in (
            ["add", saved / "book2.txt", "--model", saved / "mka"],
            ["remove", "book0.txt"],
        ):
            assert "another process is writing to it" in refused(
                capsys, "memory", *command, "--bank", bank
            )
    assert fingerprint_of_files(bank) == before


@pytest.mark.parametrize(
    "stage",
    [
        "mka.models.reading.read_in_pieces",
        "mka.memory.bank.write_store",
        "mka.storage.write_atomically",
    ],
)
def test_killed_in_the_middle_of_an_add(
    saved: Path, bank: Path, stage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The bank is as before; the next add sweeps what was left, and is whole."""
    before = fingerprint_of_files(bank)
    module, name = stage.rsplit(".", 1)
    code = (
        f"import os, sys, mka.cli, mka.models.banks, mka.memory.bank, mka.storage, {module} as "
        "module\n"
        "kill = lambda *_, **__: os.kill(os.getpid(), 9)\n"
        f"module.{name} = kill\n"
        f"mka.models.banks.{name} = kill\n"
        "sys.exit(mka.cli.main(sys.argv[1:]))"
    )
    add = ["memory", "add", saved / "book2.txt", "--model", saved / "mka", "--bank", bank]
    ended = subprocess.run(
        [sys.executable, "-c", code, *map(str, add)], capture_output=True, check=False
    )
    assert ended.returncode == -signal.SIGKILL
    whole = {
        name: value for name, value in fingerprint_of_files(bank).items() if ".building" not in name
    }
    assert {**before, **whole} == whole
    assert all(".lock" in name for name in whole.keys() - before.keys())
    assert [document.name for document in Bank(bank).documents()] == ["book0.txt", "book1.txt"]
    assert run(capsys, *add)[0] == 0
    assert not [name for name in files(bank / "documents") if name.endswith(".building")]
    assert run(capsys, "memory", "verify", "--bank", bank)[0] == 0
