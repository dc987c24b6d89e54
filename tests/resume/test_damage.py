"""A damaged checkpoint in a real run is named and passed over; the end is the same."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from resume.child import Instant
from resume.runs import Case

FILES = ("model.safetensors", "optimizer.safetensors", "progress.json", "manifest.json")


def truncate(path: Path) -> None:
    """Half of it, as after a crash of a disk that did not keep its word."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip_one_bit(path: Path) -> None:
    """In the middle, and of a float32 one that counts; the size stays."""
    data = bytearray(path.read_bytes())
    data[len(data) // 8 * 4 + 2] ^= 64
    path.write_bytes(bytes(data))


QUICK = ("optimizer.safetensors", flip_one_bit)


@pytest.fixture(scope="module")
def killed(whole: Case, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Killed in step 8 of the first mechanism: checkpoints of steps 3 and 6 are there."""
    case = replace(whole, home=tmp_path_factory.mktemp("killed") / "case")
    assert case.start(Instant("mka.training.loop.take_step", 8)).struck
    assert case.checkpoints("mha") == [3, 6]
    return case


@pytest.fixture
def copy(killed: Case, tmp_path: Path) -> Case:
    shutil.copytree(killed.home, tmp_path / "case")
    return replace(killed, home=tmp_path / "case")


def checkpoint(case: Case, step: int) -> Path:
    return case.folder / "checkpoints" / "mha-seed0" / f"step-{step:08d}"


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param(name, damage, marks=[] if (name, damage) == QUICK else [pytest.mark.slow])
        for name in FILES
        for damage in (truncate, flip_one_bit, Path.unlink)
    ],
)
def test_the_one_before_is_used(
    whole: Case, copy: Case, name: str, damage: Callable[[Path], None]
) -> None:
    damage(checkpoint(copy, 6) / name)
    printed = copy.go_on().printed
    assert f"checkpoint {checkpoint(copy, 6)} is skipped: {name} " in printed
    assert "Resuming after step 3 of 12" in printed
    assert copy.outcome() == whole.outcome()


@pytest.mark.parametrize("damage", [truncate, pytest.param(flip_one_bit, marks=pytest.mark.slow)])
def test_a_training_without_a_whole_checkpoint_starts_anew(
    whole: Case, copy: Case, damage: Callable[[Path], None]
) -> None:
    for step in (3, 6):
        damage(checkpoint(copy, step) / "optimizer.safetensors")
    printed = copy.go_on().printed
    for step in (3, 6):
        assert f"checkpoint {checkpoint(copy, step)} is skipped: optimizer.safetensors " in printed
    assert "Going on" not in printed
    assert copy.outcome() == whole.outcome()


def test_damage_that_is_not_looked_for_is_noticed_in_the_end(whole: Case, copy: Case) -> None:
    """Or the tests above could pass without a checksum."""
    flip_one_bit(checkpoint(copy, 6) / "model.safetensors")
    assert "Resuming after step 6" in copy.go_on(defect="believe_every_file").printed
    assert (
        copy.outcome().weights["mha-seed0/model.safetensors"]
        != whole.outcome().weights["mha-seed0/model.safetensors"]
    )
