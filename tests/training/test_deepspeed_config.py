"""A DeepSpeed file: what is not allowed in it is one line that names file and key, before anything
is started."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from mka.errors import InputError
from mka.training import deepspeed_config, deepspeed_settings

ROOT = Path(__file__).parent.parent.parent
SHIPPED = [ROOT / "ds_config.json", *sorted((ROOT / "configs").glob("*.json"))]


@pytest.fixture(autouse=True)
def package_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tested here is the file; DeepSpeed is never imported for it."""
    monkeypatch.setattr(deepspeed_config, "find_spec", lambda name: object())


def written(folder: Path, content: str | bytes) -> str:
    path = folder / "ds.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def refused(path: str) -> str:
    with pytest.raises(InputError) as error:
        deepspeed_settings(path)
    line = str(error.value)
    assert "\n" not in line
    assert path in line
    return line


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_file_of_the_repository_is_accepted(path: Path) -> None:
    settings = deepspeed_settings(str(path))
    assert settings["zero_optimization"]["stage"] in (1, 2, 3)
    assert not set(settings) & set(deepspeed_config.DECIDED)


def test_there_is_one_for_each_stage() -> None:
    assert len(SHIPPED) > 3
    stages = {
        path.name: deepspeed_settings(str(path))["zero_optimization"]["stage"] for path in SHIPPED
    }
    assert {stages[f"ds_config_zero{stage}.json"] for stage in (1, 2, 3)} == {1, 2, 3}
    assert all(stages[f"ds_config_zero{stage}.json"] == stage for stage in (1, 2, 3))


def test_without_a_file_it_is_stage_2() -> None:
    assert deepspeed_settings(None) == {"zero_optimization": {"stage": 2}}


def test_what_is_not_decided_elsewhere_is_passed_on(tmp_path: Path) -> None:
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}}
    content = {
        "zero_optimization": zero,
        "steps_per_print": 7,
        "fp16": {"enabled": False},
        "bf16": "auto",
    }
    assert deepspeed_settings(written(tmp_path, json.dumps(content))) == {
        "zero_optimization": zero,
        "steps_per_print": 7,
    }


DECIDED_VALUES: list[tuple[str, Any]] = [
    ("train_batch_size", 8),
    ("train_micro_batch_size_per_gpu", 1),
    ("train_micro_batch_size_per_gpu", None),
    ("gradient_accumulation_steps", 2),
    ("gradient_clipping", 1.0),
    ("gradient_clipping", 0),
    ("optimizer", {"type": "AdamW", "params": {"lr": 1e-3}}),
    ("scheduler", {"type": "WarmupLR"}),
    ("fp16", {"enabled": True}),
    ("fp16", {"enabled": "auto"}),
    ("fp16", {"loss_scale": 0}),
    ("bf16", {"enabled": True}),
    ("bf16", True),
    ("torch_autocast", {"enabled": True, "dtype": "bfloat16"}),
    ("amp", {"enabled": True, "opt_level": "O1"}),
]


@pytest.mark.parametrize(("key", "value"), DECIDED_VALUES)
def test_a_key_that_is_decided_elsewhere(tmp_path: Path, key: str, value: Any) -> None:
    path = written(tmp_path, json.dumps({"zero_optimization": {"stage": 2}, key: value}))
    instead = deepspeed_config.DECIDED[key]
    assert (
        refused(path)
        == f'{key} in {path} is {json.dumps(value)}; it is set by {instead}: leave it out or "auto"'
    )


def test_every_decided_key_has_a_case() -> None:
    assert {key for key, _ in DECIDED_VALUES} == set(deepspeed_config.DECIDED)


@pytest.mark.parametrize("value", ["auto", {"enabled": False}, {"enabled": False, "loss_scale": 0}])
@pytest.mark.parametrize("key", deepspeed_config.DECIDED)
def test_auto_and_disabled_are_allowed(tmp_path: Path, key: str, value: Any) -> None:
    path = written(tmp_path, json.dumps({"zero_optimization": {"stage": 1}, key: value}))
    assert deepspeed_settings(path) == {"zero_optimization": {"stage": 1}}


@pytest.mark.parametrize("stage", [0, 4, -1, True, "2", None, [2], {}, 1.5])
def test_a_stage_that_is_none_of_the_three(tmp_path: Path, stage: Any) -> None:
    path = written(tmp_path, json.dumps({"zero_optimization": {"stage": stage}}))
    assert (
        refused(path)
        == f"zero_optimization.stage in {path} is {json.dumps(stage)}; allowed: 1, 2, 3"
    )


@pytest.mark.parametrize(
    "content", [{}, {"zero_optimization": {}}, {"zero_optimization": 2}, {"stage": 2}], ids=str
)
def test_without_a_stage(tmp_path: Path, content: dict[str, Any]) -> None:
    path = written(tmp_path, json.dumps(content))
    assert refused(path) == f"zero_optimization.stage in {path} is null; allowed: 1, 2, 3"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "is not JSON: "),
        (b"{", "is not JSON: "),
        (b'{"zero_optimization": {"stage": 2},}', "is not JSON: "),
        (b'{\n"stage"\n: 2 2}', "is not JSON: "),
        (b"stage: 2", "is not JSON: "),
        (b"\xff\xfe{", "is not JSON: "),
        (b"[]", "is not a JSON object"),
        (b"2", "is not a JSON object"),
        (b"null", "is not a JSON object"),
    ],
)
def test_a_file_that_is_no_json_object(tmp_path: Path, content: bytes, reason: str) -> None:
    path = written(tmp_path, content)
    assert refused(path).startswith(f"deepspeed_config is '{path}', which {reason}")


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere.json")
    assert (
        refused(missing)
        == f"deepspeed_config is '{missing}', which cannot be read: No such file or directory"
    )
    assert (
        refused(str(tmp_path))
        == f"deepspeed_config is '{tmp_path}', which cannot be read: Is a directory"
    )


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(deepspeed_config, "find_spec", asked.append)
    with pytest.raises(
        InputError,
        match=r"^--deepspeed needs the package deepspeed; pip install 'mka\[deepspeed\]'$",
    ):
        deepspeed_settings(None)
    assert asked == ["deepspeed"]
    assert importlib.util.find_spec("mka"), "the real one still answers"
