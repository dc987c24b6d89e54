"""A version of transformers that was not tried is checked, once, before the first model is
built."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.requirements import Requirement
from torch import nn
from transformers import AutoModelForCausalLM

from checks_models import make_model, tokens
from checks_versions import hand_on, stale, without, without_mask
from mka.attention import ATTENTION_TYPES
from mka.models import StateLayer, versions
from mka.models.modeling import MODELS, MkaLlamaForCausalLM

IDS = tokens(2, 14)
ROOT = Path(__file__).parents[2]


def test_the_tried_versions_are_those_that_can_be_installed() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
    bounds = re.search(r'"transformers>=5\.(\d+),<5\.(\d+)"', pyproject)
    assert bounds is not None
    assert ((5, int(bounds[1])), (5, int(bounds[2]) - 1)) == (versions.OLDEST, versions.NEWEST)


def test_every_dependency_is_bounded_by_what_was_tried() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
    listed = pyproject.partition("\ndependencies = [\n")[2].partition("\n]")[0]
    pins = [
        Requirement(line)
        for line in (ROOT / "constraints.txt").read_text("utf-8").splitlines()
        if "==" in line
    ]
    wanted = {needed.name: needed for needed in map(Requirement, re.findall(r'"(.+?)"', listed))}
    assert {"torch", "transformers", "numpy"} <= wanted.keys() <= {pin.name for pin in pins}
    for needed in wanted.values():
        assert {bound.operator for bound in needed.specifier} == {">=", "<"}, (
            f"{needed} has no upper bound"
        )
    for pin in pins:
        [exact] = pin.specifier
        assert pin.name not in wanted or wanted[pin.name].specifier.contains(exact.version), (
            f"{pin} is out of bounds"
        )


@pytest.fixture
def untried(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A later transformers; the list is of the mechanisms that were checked."""
    monkeypatch.setattr(versions.transformers, "__version__", "5.99.0.dev0")
    return watched(monkeypatch)


def watched(patch: pytest.MonkeyPatch) -> list[str]:
    done: list[str] = []
    real = versions.difference

    def difference(model_class: Any, kind: str, options: dict[str, Any]) -> float:
        done.append(kind)
        return real(model_class, kind, options)

    patch.setattr(versions, "difference", difference)
    patch.setattr(versions, "checked_classes", set())
    return done


KINDS = [*ATTENTION_TYPES]


@pytest.mark.parametrize("backbone", ["gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma3"])
def test_an_untried_version_is_checked_once(backbone: str, untried: list[str]) -> None:
    make_model(backbone, "mha")
    assert untried == KINDS
    make_model(backbone, "mqa")
    assert untried == KINDS


@pytest.mark.parametrize("family", MODELS)
def test_every_family_passes(family: str, untried: list[str]) -> None:
    versions.check_version(MODELS[family])
    assert untried == KINDS


def test_a_tried_version_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    done = watched(monkeypatch)
    for version in ("5.20.0", "5.24.0", "5.24.1", versions.transformers.__version__):
        monkeypatch.setattr(versions.transformers, "__version__", version)
        make_model("llama", "mha")
    assert done == []
    for number, version in enumerate(("5.19.0", "5.25.0", "6.0.0.dev0"), start=1):
        monkeypatch.setattr(versions.transformers, "__version__", version)
        versions.checked_classes.clear()
        make_model("llama", "mha")
        assert done == number * KINDS


def test_the_check_leaves_nothing_behind(untried: list[str]) -> None:
    """Wherever a model is built: random numbers, default dtype, device and gradients are as
    before."""
    torch.manual_seed(3)
    random = torch.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), torch.autocast("cpu", dtype=torch.bfloat16):
            versions.check_version(MkaLlamaForCausalLM)
            assert torch.zeros(1).device.type == "meta"
        assert torch.zeros(1).dtype == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert untried == KINDS
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), random)


def test_a_folder_is_loaded_after_the_check(untried: list[str], tmp_path: Path) -> None:
    """from_pretrained builds without data, in the folder's dtype."""
    model = make_model("llama", "fmka").to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    versions.checked_classes.clear()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert untried == 2 * KINDS
    assert loaded.dtype == torch.bfloat16
    assert torch.equal(loaded(IDS, use_cache=False).logits, model(IDS, use_cache=False).logits)


def test_weights_that_are_only_described_cannot_be_checked(
    untried: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As libraries for large models do it: the check is left to the next model."""
    real = nn.Module.register_parameter

    def described(module: nn.Module, name: str, parameter: Any) -> None:
        real(module, name, None if parameter is None else nn.Parameter(parameter.to("meta")))

    with monkeypatch.context() as patch:
        patch.setattr(nn.Module, "register_parameter", described)
        make_model("llama", "mha")
    assert untried == []
    make_model("llama", "mha")
    assert untried == KINDS


@pytest.mark.parametrize(
    ("plant", "said"),
    [
        (
            lambda patch: hand_on(patch, without),
            "mha does not decode: InputError: the cache of layer 0 took in 0 of",
        ),
        (
            lambda patch: patch.setattr(StateLayer, "attend", stale),
            "two cached calls of mha differ from one call by",
        ),
        (
            lambda patch: hand_on(patch, without_mask),
            "two cached calls of mha differ from one call by",
        ),
    ],
    ids=["no cache", "a cache that forgets", "no mask"],
)
def test_an_untried_version_that_decodes_wrongly_is_refused(
    plant: Callable[[pytest.MonkeyPatch], None],
    said: str,
    untried: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plant(monkeypatch)
    for _ in range(2):
        with pytest.raises(ValueError, match=said) as refused:
            make_model("llama", "fmka")
        assert "transformers 5.99.0.dev0 is installed; tested: 5.20 to 5.24" in str(refused.value)
        assert "\n" not in str(refused.value)
