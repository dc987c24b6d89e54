"""Two runs in one folder: the second is told in one line, and writes nothing."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mka import cli
from mka.distributed import Ranks
from mka.errors import InputError
from mka.experiments import benchmark, comparison
from mka.record.folders import claimed
from thread_ranks import on_ranks
from tiny_runs import Place, end, fingerprint

COMMAND = ("--attention_type", "mqa", "--max_steps", 1)


def is_claimed(folder: Path) -> bool:
    try:
        with claimed(folder):
            return False
    except InputError:
        return True


@pytest.mark.parametrize("other", ["run", "link", "run/../run"])
def test_the_second_run_is_told(place: Place, other: str) -> None:
    """Whatever it calls the folder; when the first has ended the same command goes on."""
    assert place.bench(*COMMAND).status == 0
    (place.folder / "link").symlink_to(place.folder / "run")
    before = fingerprint(place.folder)
    with claimed(place.folder / "run"):
        complaint = place.bench(*COMMAND, "--seeds", 1, output=other).complaint
        assert complaint == (
            f"benchmark.py: another run is writing to {place.folder / other}; wait until it "
            "has ended, or choose "
            "another --output_dir"
        )
        assert fingerprint(place.folder) == before
        assert end(cli.main, "report", place.folder / "run").status == 0, "a report only reads"
        assert end(cli.main, "verify", place.folder / "run").status == 0
    assert place.bench(*COMMAND, "--seeds", 1, output=other).status == 0
    assert place.keys() == [("mqa", 0), ("mqa", 1)]


def test_the_second_run_is_told_before_anything_is_there(place: Place) -> None:
    with claimed(place.folder / "run"):
        before = fingerprint(place.folder)
        assert "another run is writing to" in place.bench(*COMMAND).complaint
        assert fingerprint(place.folder) == before
    assert place.bench(*COMMAND).status == 0


def test_a_run_has_its_folder_from_before_the_first_file_to_the_last(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = {}

    def watch(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def watched(*arguments: Any) -> Any:
            before = is_claimed(place.folder / "run")
            answer = function(*arguments)
            seen[name] = (before, is_claimed(place.folder / "run"))
            return answer

        monkeypatch.setattr(owner, name, watched)

    watch(comparison, "open_folder")
    for name in ("train_model", "export_model", "append_result", "observe_models"):
        watch(benchmark, name)
    assert place.bench(*COMMAND).status == 0
    assert seen == dict.fromkeys(
        ("open_folder", "train_model", "export_model", "append_result", "observe_models"),
        (True, True),
    )
    assert not is_claimed(place.folder / "run")


def test_a_run_that_fails_gives_its_folder_back(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise InputError("no")

    with monkeypatch.context() as patch:
        patch.setattr(benchmark, "train_model", fail)
        assert place.bench(*COMMAND).complaint == "benchmark.py: no"
    assert not is_claimed(place.folder / "run")


def test_a_run_that_began_and_ended_meanwhile_is_seen(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between this one's look at an empty folder and its claim: the configuration there is the
    other one's."""

    @contextmanager
    def late(folder: Path) -> Iterator[None]:
        with claimed(folder):
            (folder / "config.json").write_text(json.dumps({"seeds": "another run's"}))
            yield

    monkeypatch.setattr(comparison, "claimed", late)
    assert "run holds a different configuration" in place.bench(*COMMAND).complaint
    assert sorted(path.name for path in (place.folder / "run").iterdir()) == [
        ".lock",
        "config.json",
    ]


def test_a_refusal_reaches_every_rank(tmp_path: Path) -> None:
    """As the same error, of whose kind and words each rank makes the same end."""

    def enter(ranks: Ranks) -> None:
        with claimed(tmp_path):
            pytest.fail("it was free")

    with claimed(tmp_path):
        ended = on_ranks(3, lambda ranks: ranks.on_main(lambda: enter(ranks)))
    assert {type(error) for error in ended} == {InputError}
    assert {str(error) for error in ended} == {
        (
            f"another run is writing to {tmp_path}; wait until it has ended, or choose another "
            "--output_dir"
        )
    }
