"""Defects of converted and cached models, planted: the tests of tests/models turn red."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import checks
from checks_versions import hand_on, stale, under, without
from mka.memory.router import Router
from mka.models import versions
from mka.models.cache import StateLayer
from models import test_cache, test_convert, test_generation, test_versions

conversion = importlib.import_module("mka.models.convert")  # the package's name for it is the function
Plant = Callable[[pytest.MonkeyPatch], None]


def gate_that_starts_open(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Router, "learn_gate", lambda router: None)


def keys_and_values_exchanged(patch: pytest.MonkeyPatch) -> None:
    real = conversion.projections

    def exchanged(attention: Any) -> dict[str, dict[str, Tensor]]:
        found = real(attention)
        return found | {"k_proj": found["v_proj"], "v_proj": found["k_proj"]}

    patch.setattr(conversion, "projections", exchanged)


def another_rotary_base(patch: pytest.MonkeyPatch) -> None:
    from mka.ops.rotary import RotaryEmbedding

    patch.setattr("mka.models.modeling.rotary_of", lambda config, head_dim: RotaryEmbedding(head_dim, 500.0))


def crop_that_counts_padding(patch: pytest.MonkeyPatch) -> None:
    real = StateLayer.crop

    def crop(layer: StateLayer, tokens_to_remove: int) -> None:
        layer.calls = [(count, None) for count, _ in layer.calls]
        real(layer, tokens_to_remove)

    patch.setattr(StateLayer, "crop", crop)


def beams_left_in_place(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StateLayer, "reorder_cache", lambda layer, beams: None)


def padding_that_is_read(patch: pytest.MonkeyPatch) -> None:
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    from mka.models.adapter import PADDING_MASK

    patch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, PADDING_MASK, lambda **_: None)


def positions_from_the_padded_index(patch: pytest.MonkeyPatch) -> None:
    """A row's positions count its columns, padding included, from call to call."""
    patch.setattr(test_cache, "positions_of", lambda mask: torch.arange(mask.shape[1]).expand(mask.shape))


def crop_that_is_not_done(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StateLayer, "crop", lambda layer, tokens_to_remove: None)


def cache_argument_renamed_again(patch: pytest.MonkeyPatch) -> None:
    """transformers has another name for it than those that are known, and the adapter asks by name."""

    def by_name(_attention: Any, _block: int, arguments: dict[str, Any]) -> Any:
        return next((arguments[name] for name in versions.CACHE_NAMES if name in arguments), None)

    hand_on(patch, under("keys_of_the_past"))
    patch.setattr("mka.models.adapter.cache_for_block", by_name)


def cache_argument_renamed_and_nobody_looks(patch: pytest.MonkeyPatch) -> None:
    cache_argument_renamed_again(patch)
    cache_that_nobody_misses(patch)


def cache_that_nobody_misses(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(versions, "check_growth", lambda *_: None)


def untried_version_that_is_trusted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(versions, "TOLERANCE", float("inf"))


def lost_cache_is_refused() -> None:
    with pytest.MonkeyPatch.context() as patch:
        blocks = (1,)
        test_versions.test_a_cache_that_does_not_arrive_is_an_error("llama", "the default", without, blocks, patch)


def wrong_version_is_refused() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(versions.transformers, "__version__", "5.99.0.dev0")
        patch.setattr(versions, "checked_classes", set())
        patch.setattr(StateLayer, "attend", stale)
        with pytest.raises(ValueError, match="two cached calls of gqa differ from one call"):
            test_cache.make_model("llama", "fmka")


def padded_rows_are_rows_alone() -> None:
    """Interior padding: every row gives what it gives alone."""
    model, ids = test_cache.make_model("llama", "fmka", dtype=torch.float64), test_cache.tokens(3, 33)
    mask = test_cache.padding("interior", 3)
    assert mask is not None
    logits, _ = test_cache.in_calls(model, ids, (9, 20), mask)
    for row, kept in enumerate(mask):
        checks.close(logits[row, kept], model(ids[row : row + 1, kept], use_cache=False).logits[0])


DEFECTS: list[tuple[Plant, Callable[[], None]]] = [
    (gate_that_starts_open, lambda: test_convert.test_within_the_window_a_memory_changes_nothing("llama", "fmka")),
    (keys_and_values_exchanged, lambda: test_convert.test_gqa_with_the_models_own_groups_changes_nothing("gpt2")),
    (another_rotary_base, lambda: test_convert.test_gqa_with_the_models_own_groups_changes_nothing("qwen2")),
    (crop_that_counts_padding, lambda: test_cache.test_crop_takes_columns_back_padding_included("mka")),
    (beams_left_in_place, lambda: test_generation.test_beam_search("mka", "llama")),
    (padding_that_is_read, lambda: test_generation.test_left_padding("mka", "llama")),
    (positions_from_the_padded_index, padded_rows_are_rows_alone),
    (crop_that_is_not_done, lambda: test_generation.test_assisted_decoding("fmka", "llama")),
    (cache_argument_renamed_again, lambda: test_generation.test_greedy("fmka", "llama", None)),
    (cache_argument_renamed_and_nobody_looks, lambda: test_generation.test_greedy("fmka", "llama", None)),
    (cache_that_nobody_misses, lost_cache_is_refused),
    (untried_version_that_is_trusted, wrong_version_is_refused),
]


@pytest.mark.parametrize(("plant", "check"), DEFECTS, ids=[plant.__name__ for plant, _ in DEFECTS])
def test_the_models_turn_red(plant: Plant, check: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> None:
    check()
    plant(monkeypatch)
    with pytest.raises((AssertionError, ValueError, pytest.fail.Exception)):
        check()
