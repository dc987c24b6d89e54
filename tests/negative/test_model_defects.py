"""Defects of converted and cached models, planted: the tests of tests/models turn red."""

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import checks
from checks_versions import hand_on, stale, under, without
from mka.attention import grouped
from mka.memory.router import Router
from mka.models import families, layers, versions
from mka.models.cache import StateLayer
from models import test_cache, test_convert, test_generation, test_mixed_layers, test_versions

conversion = importlib.import_module(
    "mka.models.convert"
)  # the package's name for it is the function
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

    patch.setattr(
        "mka.models.layers.rotary_of",
        lambda config, head_dim, layer: RotaryEmbedding(head_dim, 500.0),
    )


def one_rotary_base_for_all_layers(patch: pytest.MonkeyPatch) -> None:
    last: Any = layers.rotary_of
    patch.setattr(
        layers,
        "rotary_of",
        lambda config, head_dim, _: last(config, head_dim, config.num_hidden_layers - 1),
    )


def scale_of_the_head_size(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(layers, "query_factor", lambda config: 1.0)


def scale_applied_twice(patch: pytest.MonkeyPatch) -> None:
    real: Any = layers.query_factor
    patch.setattr(layers, "query_factor", lambda config: real(config) ** 2)


def norm_that_multiplies_by_the_weight_alone(patch: pytest.MonkeyPatch) -> None:
    gemma = families.FAMILIES["gemma3_text"]
    plain = replace(gemma, head_norm=families.FAMILIES["qwen3"].head_norm)
    patch.setitem(families.FAMILIES, "gemma3_text", plain)


def sliding_layers_with_sinks(patch: pytest.MonkeyPatch) -> None:
    real = layers.build_attention

    def build(kind: str, **options: Any) -> Any:
        return real(
            kind, **options | ({"sink_tokens": 4} if options.get("sink_tokens") == 0 else {})
        )

    patch.setattr(layers, "build_attention", build)


def sliding_layers_with_a_window_that_is_one_longer(patch: pytest.MonkeyPatch) -> None:
    real = layers.build_attention

    def build(kind: str, **options: Any) -> Any:
        return real(
            kind, **options | ({"local_window": 8} if options.get("local_window") == 7 else {})
        )

    patch.setattr(layers, "build_attention", build)


def sink_logits_left_out(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(grouped, "with_empty", lambda read, logits: read)


def sink_logits_that_the_other_reads_do_not_meet(patch: pytest.MonkeyPatch) -> None:
    """The window is read with its empty key, and the softmax over all reads knows nothing of it."""
    real = grouped.with_empty
    patch.setattr(
        grouped, "with_empty", lambda read, logits: real(read, logits)._replace(lse=read.lse)
    )


def sink_logits_that_stay_at_zero(patch: pytest.MonkeyPatch) -> None:
    real = layers.GroupedAttention.learn_sink_logits

    def learn(attention: Any) -> None:
        real(attention)
        attention.sink_logits.copy_ = lambda _: None

    patch.setattr(layers.GroupedAttention, "learn_sink_logits", learn)


def kinds_of_layers_that_every_family_has(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        families, "layer_types", lambda config, family: getattr(config, "layer_types", ())
    )


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
    patch.setattr(
        test_cache, "positions_of", lambda mask: torch.arange(mask.shape[1]).expand(mask.shape)
    )


def crop_that_is_not_done(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(StateLayer, "crop", lambda layer, tokens_to_remove: None)


def cache_argument_renamed_again(patch: pytest.MonkeyPatch) -> None:
    """transformers has another name for it than those that are known, and the adapter asks by
    name."""

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
        test_versions.test_a_cache_that_does_not_arrive_is_an_error(
            "llama", "the default", without, blocks, patch
        )


def wrong_version_is_refused() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(versions.transformers, "__version__", "5.99.0.dev0")
        patch.setattr(versions, "checked_classes", set())
        patch.setattr(StateLayer, "attend", stale)
        with pytest.raises(ValueError, match="two cached calls of mha differ from one call"):
            test_cache.make_model("llama", "fmka")


def padded_rows_are_rows_alone() -> None:
    """Interior padding: every row gives what it gives alone."""
    model, ids = (
        test_cache.make_model("llama", "fmka", dtype=torch.float64),
        test_cache.tokens(3, 33),
    )
    mask = test_cache.padding("interior", 3)
    assert mask is not None
    logits, _ = test_cache.in_calls(model, ids, (9, 20), mask)
    for row, kept in enumerate(mask):
        checks.close(logits[row, kept], model(ids[row : row + 1, kept], use_cache=False).logits[0])


def nothing_is_left_out(kind: str, family: str) -> Callable[[], None]:
    options = {"gqa": {}, "mka": {"local_window": 9} | test_mixed_layers.EVERYTHING}[kind]
    return lambda: test_mixed_layers.test_it_is_the_pretrained_model_where_nothing_is_left_out(
        kind, options, family
    )


DEFECTS: list[tuple[Plant, Callable[[], None]]] = [
    (one_rotary_base_for_all_layers, nothing_is_left_out("gqa", "gemma3")),
    (scale_of_the_head_size, nothing_is_left_out("gqa", "gemma3")),
    (scale_applied_twice, nothing_is_left_out("mka", "gemma3")),
    (norm_that_multiplies_by_the_weight_alone, nothing_is_left_out("gqa", "gemma3")),
    (sliding_layers_with_sinks, nothing_is_left_out("gqa", "qwen3")),
    (sliding_layers_with_a_window_that_is_one_longer, nothing_is_left_out("gqa", "gemma3")),
    (sink_logits_left_out, nothing_is_left_out("gqa", "gpt_oss")),
    (sink_logits_that_the_other_reads_do_not_meet, nothing_is_left_out("mka", "gpt_oss")),
    (sink_logits_that_stay_at_zero, nothing_is_left_out("gqa", "gpt_oss")),
    (
        kinds_of_layers_that_every_family_has,
        test_mixed_layers.test_what_layers_are_is_what_the_family_makes_of_its_configuration,
    ),
    (
        gate_that_starts_open,
        lambda: test_convert.test_within_the_window_a_memory_changes_nothing("llama", "fmka"),
    ),
    (
        keys_and_values_exchanged,
        lambda: test_convert.test_gqa_with_the_models_own_groups_changes_nothing("gpt2"),
    ),
    (
        another_rotary_base,
        lambda: test_convert.test_gqa_with_the_models_own_groups_changes_nothing("qwen2"),
    ),
    (
        crop_that_counts_padding,
        lambda: test_cache.test_crop_takes_columns_back_padding_included("mka"),
    ),
    (beams_left_in_place, lambda: test_generation.test_beam_search("mka", "llama")),
    (padding_that_is_read, lambda: test_generation.test_left_padding("mka", "llama")),
    (positions_from_the_padded_index, padded_rows_are_rows_alone),
    (crop_that_is_not_done, lambda: test_generation.test_assisted_decoding("fmka", "llama")),
    (cache_argument_renamed_again, lambda: test_generation.test_greedy("fmka", "llama", None)),
    (
        cache_argument_renamed_and_nobody_looks,
        lambda: test_generation.test_greedy("fmka", "llama", None),
    ),
    (cache_that_nobody_misses, lost_cache_is_refused),
    (untried_version_that_is_trusted, wrong_version_is_refused),
]


@pytest.mark.parametrize(("plant", "check"), DEFECTS, ids=[plant.__name__ for plant, _ in DEFECTS])
def test_the_models_turn_red(
    plant: Plant, check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    check()
    plant(monkeypatch)
    with pytest.raises((AssertionError, ValueError, pytest.fail.Exception)):
        check()
