"""The user's files: what is swept, where outputs go, links, devices, permissions."""

import errno
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import pytest

from mka import cli
from mka.cli.output import check_output, shortened
from mka.data.cache import default_cache_dir
from mka.errors import InputError, printable
from mka.record.folders import WRITTEN
from mka.storage import sweep, write_atomically, write_folder
from mka.training.checkpoint import Checkpoint, Checkpoints
from tiny_runs import Place, finished_run

MINE = [
    ".notes.2024",
    ".git/.pack.12",
    ".config.json.2024",
    "figures/.sketch.mka-12",
    "curves/.mka-seed0.jsonl.bak.7",
    ".hidden.mka-7",
    "deep/.table.md.mka-7",
]
OURS = [
    ".config.json.mka-12",
    ".table.md.mka-1",
    "curves/.mka-seed0.jsonl.mka-99",
    "figures/.loss_time.svg.mka-3",
]


def filled(folder: Path, names: list[str]) -> list[Path]:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("precious")
    return [folder / name for name in names]


def test_only_what_we_wrote_is_swept(tmp_path: Path) -> None:
    mine, ours = filled(tmp_path, MINE), filled(tmp_path, OURS)
    (tmp_path / ".environment.json.mka-5").symlink_to(mine[0])
    sweep(tmp_path, WRITTEN)
    assert all(path.read_text() == "precious" for path in mine)
    assert not any(path.exists() for path in ours)
    assert (tmp_path / ".environment.json.mka-5").is_symlink()


def test_a_run_deletes_nothing_of_the_user(place: Place) -> None:
    run = finished_run(place, "--attention_type", "mha")
    mine = filled(run, MINE)
    finished_run(place, "--attention_type", "mha", "gqa")
    assert all(path.read_text() == "precious" for path in mine)


def test_what_a_killed_write_left_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", lambda *_: os.kill)  # never renamed
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    write_atomically(tmp_path / "config.json", "{}")
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == [f".config.json.mka-{os.getpid()}"]
    sweep(tmp_path, WRITTEN)
    assert not any(tmp_path.iterdir())


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    target = tmp_path / "folder" / "target"
    target.write_text("old")
    link = tmp_path / "link"
    link.symlink_to(target)
    write_atomically(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"


def test_a_link_to_nothing_is_followed(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_atomically(tmp_path / "link", "new")
    assert (tmp_path / "target").read_text() == "new"
    assert (tmp_path / "link").is_symlink()


def test_a_loop_of_links_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(OSError, match="Too many levels"):
        write_atomically(tmp_path / "a", "new")
    with pytest.raises(InputError, match=r"output is .* cannot be written: Too many levels"):
        check_output("output", str(tmp_path / "a"))


def test_a_device_and_a_pipe_get_the_text(tmp_path: Path) -> None:
    write_atomically(Path(os.devnull), "text")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match="No such device"):
        write_atomically(pipe, "nobody reads")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomically(pipe, "text")
    assert os.read(reader, 99) == b"text"
    os.close(reader)
    assert pipe.is_fifo()


def test_permissions_stay(tmp_path: Path) -> None:
    path = tmp_path / "results"
    path.write_text("old")
    for mode in (0o600, 0o640, 0o444):
        path.chmod(mode)
        write_atomically(path, "new")
        assert stat.S_IMODE(path.stat().st_mode) == mode


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_files_of_a_folder_have_the_permissions_of_the_umask(tmp_path: Path, umask: int) -> None:
    def fill(folder: Path) -> dict[str, Any]:
        for name in ("model.safetensors", "config.json"):
            (folder / name).write_text("x")
        (folder / "model.safetensors").chmod(0o600)
        return {}

    before = os.umask(umask)
    try:
        write_folder(tmp_path / "model", fill)
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "model").iterdir()}
    assert modes == {0o666 & ~umask}


def test_weights_are_kept_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    checkpoints = Checkpoints(tmp_path / "checkpoints", {})
    checkpoints.save(Checkpoint(3, {"w": torch.ones(2)}, {}, {}))

    def link(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    checkpoints.export_weights(3, tmp_path / "model" / "model.safetensors")
    step = next((tmp_path / "checkpoints").glob("step-*")) / "model.safetensors"
    kept = tmp_path / "model" / "model.safetensors"
    assert kept.read_bytes() == step.read_bytes()
    assert [path.name for path in kept.parent.iterdir()] == ["model.safetensors"]


def test_no_home_folder_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(InputError, match="set XDG_CACHE_HOME to a folder"):
        default_cache_dir()


FILES_OF_A_RUN = [
    *("results.jsonl", "config.json", "environment.json", "manifest.json", "table.md"),
    *("curves/mha-seed0.jsonl", "costs.jsonl"),
    *(f"models/mha-seed0/{name}" for name in ("model.safetensors", "config.json")),
]


@pytest.fixture(scope="module")
def run(tiny_place: Place) -> Path:
    return finished_run(tiny_place, "--attention_type", "mha")


@pytest.mark.parametrize("option", ["html", "markdown"])
@pytest.mark.parametrize("name", FILES_OF_A_RUN)
def test_a_page_does_not_replace_results(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str, name: str
) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    before = (copied / name).read_bytes()
    link = tmp_path / "link"
    link.symlink_to(copied / name)
    for path in (copied / name, link):
        capsys.readouterr()
        assert cli.main(["report", str(copied), f"--{option}", str(path)]) == 2
        printed = capsys.readouterr()
        assert f"{option} is {str(path)!r}; it is a file of a run, a saved model" in printed.err
        assert (printed.out, printed.err.count("\n")) == ("", 1)
        assert (copied / name).read_bytes() == before


def test_other_names_in_a_run_are_the_users(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "run"
    shutil.copytree(run, copied)
    for _ in range(2):  # what is there from the first time is replaced
        assert cli.main(["report", str(copied), "--html", str(copied / "page.html")]) == 0
    check_output("output", str(copied / "scores.jsonl"))
    (tmp_path / "results.jsonl").write_text("the user's own")
    check_output("output", str(tmp_path / "results.jsonl"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "output is empty; give the name of a file"),
        ("FOLDER", "it is a folder; give the name of a file"),
        ("FILE/page.html", "nothing can be written to"),
        ("x" * 300, "cannot be written: File name too long"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused(
    tmp_path: Path, value: str, message: str
) -> None:
    (tmp_path / "file").write_text("")
    words = value.replace("FOLDER", str(tmp_path)).replace("FILE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=message):
        check_output("output", words)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_messages_command_no_terminal_and_have_an_end() -> None:
    assert printable("a\x1b[31m\u202eb\u2028\x07é") == "a\\x1b[31m\\u202eb\\u2028\\x07é"
    assert shortened("mka: short") == "mka: short"
    assert len(shortened("mka: model is " + "x" * 5000 + "; give another")) < 200
    assert len(shortened("word " * 1000)) <= 1000
