"""A checkpoint is whole and bit for bit what was saved, or it is passed over and said so."""

import ast
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import checks_training as tiny
import mka
from disks import files, full_at, no_space
from mka import storage
from mka.distributed import Ranks
from mka.errors import InputError
from mka.training import Checkpoint, Checkpoints, Precision
from mka.training.engine import TorchEngine, stored

IDENTITY = {"learning_rate": 1e-3, "seed": 0, "data.corpus_fingerprint": "ab"}


def checkpoints_in(folder: Path, keep: int = 2) -> Checkpoints:
    return Checkpoints(folder / "mha-seed0", IDENTITY, keep)


def never(line: str) -> None:
    raise AssertionError(f"said: {line}")


def test_what_is_read_is_what_was_saved(tmp_path: Path) -> None:
    checkpoints = checkpoints_in(tmp_path)
    checkpoints.save(tiny.some_checkpoint(7))
    tiny.assert_same_checkpoint(checkpoints.newest(never), tiny.some_checkpoint(7))


@pytest.mark.parametrize("kind", ["mha", "mka", "fmka"])
def test_an_engine_is_the_same_after_a_round_trip(tmp_path: Path, kind: str) -> None:
    """Weights, moments and their counts, and the scaler, which here has grown since the start."""
    engine = TorchEngine(
        tiny.tiny_model(kind, **tiny.OPTIONS.get(kind, {})),
        1e-2,
        Precision("float16", "cpu"),
        Ranks(),
    )
    engine.scaler.set_growth_interval(2)
    for step in range(3):
        engine.gradients(tiny.batch_at(step).chunk(2))
        engine.step(1e-2)
    checkpoints, (weights, optimizer, rest) = checkpoints_in(tmp_path), engine.state()
    assert rest["scaler"]["scale"] != Precision("float16", "cpu").scaler().get_scale()
    assert all(optimizer[f"{name}.step"] == 3 for name, _ in engine.model.named_parameters())
    checkpoints.save(Checkpoint(3, weights, optimizer, {"engine": rest}))
    found = checkpoints.newest(never)
    assert found is not None
    model = tiny.tiny_model(kind, seed=5, **tiny.OPTIONS.get(kind, {}))
    for name, values in stored(model).items():
        values.data.copy_(found.weights[name])
    again = TorchEngine(model, 1e-2, Precision("float16", "cpu"), Ranks())
    again.load(found.optimizer, found.progress["engine"])
    tiny.assert_same_checkpoint(
        Checkpoint(3, *again.state()), Checkpoint(3, weights, optimizer, rest)
    )


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_stay(tmp_path: Path, keep: int) -> None:
    checkpoints = checkpoints_in(tmp_path, keep)
    for number, step in enumerate([2, 4, 90, 100, 101], 1):
        checkpoints.save(tiny.some_checkpoint(step))
        assert len(checkpoints.steps()) == min(number, keep)
    assert checkpoints.steps() == [101, 100, 90][:keep]
    tiny.assert_same_checkpoint(checkpoints.newest(never), tiny.some_checkpoint(101))


@pytest.mark.parametrize("damage", tiny.DAMAGES)
@pytest.mark.parametrize("name", tiny.CHECKPOINT_FILES)
def test_damage_is_noticed_and_the_one_before_is_used(
    tmp_path: Path, name: str, damage: str
) -> None:
    tiny.assert_damage_is_noticed(tmp_path / "mha-seed0", name, damage)


def test_where_none_is_whole_nothing_is_used_and_each_is_named(tmp_path: Path) -> None:
    checkpoints, said = checkpoints_in(tmp_path, keep=4), []
    damages = dict(zip((40, 30, 20, 10), tiny.DAMAGES.values(), strict=False))
    for step, damage in damages.items():
        checkpoints.save(tiny.some_checkpoint(step))
        damage(checkpoints.folder / f"step-{step:08d}" / "model.safetensors")
    assert checkpoints.newest(said.append) is None
    assert [line.split()[1] for line in said] == [
        str(checkpoints.folder / f"step-{step:08d}") for step in damages
    ]


def test_a_damaged_one_is_replaced_by_a_new_one_of_its_step(tmp_path: Path) -> None:
    checkpoints = checkpoints_in(tmp_path)
    checkpoints.save(tiny.some_checkpoint(7))
    tiny.flip_a_bit(checkpoints.folder / "step-00000007" / "optimizer.safetensors")
    checkpoints.save(tiny.some_checkpoint(7))
    tiny.assert_same_checkpoint(checkpoints.newest(never), tiny.some_checkpoint(7))


def test_what_is_no_checkpoint_is_left_alone(tmp_path: Path) -> None:
    checkpoints = checkpoints_in(tmp_path)
    assert checkpoints.newest(never) is None
    for name in ("step-", "step-12b", "step--3", ".step-00000009.building", "best"):
        (checkpoints.folder / name).mkdir(parents=True)
    (checkpoints.folder / "step-00000008").write_text("a file")
    assert checkpoints.newest(never) is None
    checkpoints.save(tiny.some_checkpoint(7))
    tiny.assert_same_checkpoint(checkpoints.newest(never), tiny.some_checkpoint(7))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learning_rate": 2e-3}, "learning_rate is 0.001 there, 0.002 here"),
        ({"seed": 1}, "seed is 0 there, 1 here"),
        ({"data.corpus_fingerprint": "cd"}, "data.corpus_fingerprint is ab there, cd here"),
        ({"global_batch_size": 8}, "global_batch_size is None there, 8 here"),
    ],
    ids=str,
)
def test_one_of_another_run_is_refused(
    tmp_path: Path, change: dict[str, object], said: str
) -> None:
    ours = checkpoints_in(tmp_path)
    ours.save(tiny.some_checkpoint(7))
    with pytest.raises(InputError) as refused:
        Checkpoints(ours.folder, IDENTITY | change).newest(never)
    assert (
        str(refused.value)
        == f"checkpoint {ours.folder / 'step-00000007'} is of another run: {said}"
    )


# ---- disks that are full


def full(size: int) -> Callable[[], AbstractContextManager[None]]:
    return lambda: full_at(size)


def failing(name: str) -> Callable[[], AbstractContextManager[None]]:
    @contextmanager
    def fails() -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(storage.os, name, no_space)
            yield

    return fails


@pytest.mark.parametrize(
    "disk",
    [full(0), full(100), full(30_000), full(60_000), failing("fsync"), failing("replace")],
    ids=[
        "nothing fits",
        "not the header",
        "half of the weights",
        "not the progress",
        "fsync",
        "replace",
    ],
)
def test_a_full_disk_leaves_the_last_good_one(
    tmp_path: Path, disk: Callable[[], AbstractContextManager[None]]
) -> None:
    """The weights and the moments have 48 KB each, the losses 190 KB."""
    checkpoints, larger = (
        checkpoints_in(tmp_path, keep=1),
        tiny.some_checkpoint(9, size=4000, num_losses=10_000),
    )
    checkpoints.save(tiny.some_checkpoint(7))
    before = files(checkpoints.folder)
    with pytest.raises(OSError, match=r"File too large|No space left"), disk():
        checkpoints.save(larger)
    left = files(checkpoints.folder) - before
    assert left <= {".step-00000009.lock"}, "half a checkpoint stays"
    tiny.assert_same_checkpoint(checkpoints.newest(never), tiny.some_checkpoint(7))
    checkpoints.save(larger)
    tiny.assert_same_checkpoint(checkpoints.newest(never), larger)


# ---- weights under a name of their own


def test_exported_weights_are_those_of_the_step_and_outlive_it(tmp_path: Path) -> None:
    checkpoints, path = (
        checkpoints_in(tmp_path / "checkpoints"),
        tmp_path / "models" / "mha.safetensors",
    )
    for step in (3, 6):
        checkpoints.save(tiny.some_checkpoint(step))
        for _ in range(2):
            checkpoints.export_weights(step, path)
        held = (checkpoints.folder / f"step-{step:08d}" / "model.safetensors").read_bytes()
        assert path.read_bytes() == held
        assert files(path.parent) == {"mha.safetensors"}
    checkpoints.clear()
    assert files(tmp_path) == {"models"}
    with safe_open(path, "pt") as weights:
        assert set(weights.keys()) == set(tiny.some_checkpoint(6).weights)


@pytest.mark.parametrize("damage", tiny.DAMAGES)
def test_weights_of_a_damaged_checkpoint_are_not_exported(tmp_path: Path, damage: str) -> None:
    """Neither they nor, in their place, those of the checkpoint before."""
    checkpoints, path = checkpoints_in(tmp_path), tmp_path / "model.safetensors"
    for step in (3, 6):
        checkpoints.save(tiny.some_checkpoint(step))
    tiny.DAMAGES[damage](checkpoints.folder / "step-00000006" / "model.safetensors")
    with pytest.raises(
        InputError, match=r"the weights of .*step-00000006 cannot be kept: model\.safetensors "
    ):
        checkpoints.export_weights(6, path)
    assert not path.exists()


def test_weights_of_another_step_are_not_exported(tmp_path: Path) -> None:
    tiny.assert_exports_the_step(tmp_path)


def test_weights_of_another_run_are_not_exported(tmp_path: Path) -> None:
    ours, path = checkpoints_in(tmp_path), tmp_path / "model.safetensors"
    ours.save(tiny.some_checkpoint(6))
    with pytest.raises(InputError, match=r"is of another run: seed is 0 there, 1 here"):
        Checkpoints(ours.folder, IDENTITY | {"seed": 1}).export_weights(6, path)
    assert not path.exists()


def test_clearing_leaves_those_of_another_training(tmp_path: Path) -> None:
    ours, other = (
        checkpoints_in(tmp_path / "c"),
        Checkpoints(tmp_path / "c" / "mka-seed0", IDENTITY),
    )
    for checkpoints in (ours, other):
        checkpoints.save(tiny.some_checkpoint(7))
    ours.clear()
    assert files(tmp_path / "c") == {"mka-seed0"}
    tiny.assert_same_checkpoint(other.newest(never), tiny.some_checkpoint(7))
    ours.clear()


# ---- nothing in it can run


def test_a_checkpoint_is_safetensors_and_json_only(tmp_path: Path) -> None:
    checkpoints = checkpoints_in(tmp_path)
    checkpoints.save(tiny.some_checkpoint(7))
    folder = checkpoints.folder / "step-00000007"
    assert files(folder) == set(tiny.CHECKPOINT_FILES)
    for name in ("model.safetensors", "optimizer.safetensors"):
        with safe_open(folder / name, "pt") as tensors:
            names = tensors.keys()
            assert all(torch.is_tensor(tensors.get_tensor(name)) for name in names)
    for name in ("progress.json", "manifest.json"):
        assert isinstance(json.loads((folder / name).read_text(encoding="utf-8")), dict)


PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def pickles_in(source: str) -> list[str]:
    """What a module says in code, not in prose, that reads or writes objects which can run."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [getattr(node, "module", None) or "", *(alias.name for alias in node.names)]
            found += [name for name in names if name.partition(".")[0] in PICKLES]
            found += [
                name
                for name in names[1:]
                if names[0].startswith("torch") and name in ("load", "save")
            ]
        elif isinstance(node, ast.Attribute):
            text = ast.unparse(node)
            found += (
                [text]
                if text in ("torch.load", "torch.save") or text.partition(".")[0] in PICKLES
                else []
            )
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found += ["allow_pickle"] * (ast.unparse(node.value) != "False")
    return found


def test_nothing_in_the_package_pickles() -> None:
    assert pickles_in(
        "import pickle\ntorch.load(a)\nfrom torch import save\nnp.load(a, allow_pickle=True)"
    )
    sources = list(Path(mka.__file__).parent.rglob("*.py"))
    assert len(sources) > 40
    assert {
        path.name: pickles_in(path.read_text(encoding="utf-8"))
        for path in sources
        if pickles_in(path.read_text())
    } == {}
