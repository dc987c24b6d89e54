"""Whatever transformers calls the cache, every block uses it, or the call is refused."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Cache, DynamicCache

import checks
from checks_models import TWO_BACKBONES, greedy_without_cache, make_model, tokens
from checks_versions import Change, hand_on, under, without
from mka.models import (
    CACHE_ARGUMENT,
    AttentionAdapter,
    StateLayer,
    checkpoint_blocks,
    mechanisms,
    versions,
)
from mka.models.modeling import MODELS

two_backbones = pytest.mark.parametrize("backbone", TWO_BACKBONES)
IDS = tokens(2, 14)


def in_a_box(given: dict[str, Any]) -> dict[str, Any]:
    return {key: (value,) if isinstance(value, Cache) else value for key, value in given.items()}


def in_two_calls(model: Any, cache: Cache | None, **more: Any) -> torch.Tensor:
    first = model(IDS[:, :9], past_key_values=cache, **more)
    if cache is None:
        cache = versions.cache_of(first)
    return torch.cat([first.logits, model(IDS[:, 9:], past_key_values=cache, **more).logits], dim=1)


# ---- the names


@two_backbones
@pytest.mark.parametrize("name", ["cache", "past_key_values", "keys_of_the_past"])
def test_a_block_may_call_the_cache_as_it_likes(
    backbone: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(backbone, "fmka", dtype=torch.float64)
    whole = model(IDS, use_cache=False).logits
    hand_on(monkeypatch, under(name))
    checks.close(in_two_calls(model, None, use_cache=True), whole)
    checks.close(in_two_calls(model, DynamicCache(), use_cache=False), whole)


@two_backbones
@pytest.mark.parametrize("name", ["cache", "past_key_values", "keys_of_the_past"])
def test_so_may_whoever_calls_the_model(backbone: str, name: str) -> None:
    """In calls and in `generate`; without a warning."""
    model, more = make_model(backbone, "gqa", dtype=torch.float64), {"use_cache": True}
    cache = DynamicCache()
    parts = [model(part, **{name: cache}, **more).logits for part in (IDS[:, :9], IDS[:, 9:])]
    checks.close(torch.cat(parts, dim=1), model(IDS, use_cache=False).logits)
    row, cache = IDS[:1], DynamicCache()
    model(row[:, :9], **{name: cache}, **more)
    given = model.generate(row, **{name: cache}, do_sample=False, max_new_tokens=5)
    assert torch.equal(given, greedy_without_cache(model, row, 5))


def test_no_cache_by_name_is_no_cache() -> None:
    model = make_model("llama", "gqa")
    for name in versions.CACHE_NAMES:
        checks.close(
            model(IDS, use_cache=False, **{name: None}).logits, model(IDS, use_cache=False).logits
        )


def test_two_caches_or_another_kind_of_cache_are_refused() -> None:
    model = make_model("llama", "gqa")
    with pytest.raises(ValueError, match="two caches, where one is allowed"):
        model(IDS, past_key_values=DynamicCache(), older=DynamicCache())
    for name in versions.CACHE_NAMES:
        with pytest.raises(ValueError, match=f"{name} is a dict; allowed: a Cache of transformers"):
            model(IDS, **{name: {}})


def test_the_name_is_read_from_the_installed_version() -> None:
    assert CACHE_ARGUMENT in versions.CACHE_NAMES
    assert {versions.cache_parameter(model.forward) for model in MODELS.values()} == {
        CACHE_ARGUMENT
    }
    assert versions.cache_parameter(nn.Linear.forward) is None


def test_a_later_name_is_read_too() -> None:
    def forward(model: Any, input_ids: torch.Tensor, keys_of_the_past: Cache | None = None) -> Any:
        return model.base_model(input_ids, **{CACHE_ARGUMENT: keys_of_the_past}, use_cache=True)

    model, cache = make_model("llama", "gqa"), DynamicCache()
    later = versions.with_cache(forward)
    for name in (*versions.CACHE_NAMES, "keys_of_the_past"):
        later(model, IDS, **{name: cache})
    assert cache.get_seq_length() == 3 * IDS.shape[1]


# ---- a cache that does not arrive

Use = Callable[[Any], Any]
WAYS: dict[str, Use] = {
    "a cache": lambda model: model(IDS, past_key_values=DynamicCache()),
    "a cache, use_cache False": lambda model: model(
        IDS, past_key_values=DynamicCache(), use_cache=False
    ),
    "a cache by position": lambda model: model(
        *([IDS, DynamicCache()] if gpt2(model) else [IDS, None, None, DynamicCache()])
    ),
    "embeddings": lambda model: model(inputs_embeds=torch.zeros(2, 3, 32), use_cache=True),
    "a tuple": lambda model: model(IDS, use_cache=True, return_dict=False),
    "use_cache alone": lambda model: model(IDS, use_cache=True),
    "the default": lambda model: model(IDS),
    "weights": lambda model: model(IDS, output_attentions=True),
    "greedy": lambda model: model.generate(IDS, do_sample=False, max_new_tokens=3),
    "sampling": lambda model: model.generate(IDS, do_sample=True, max_new_tokens=3),
    "beams": lambda model: model.generate(IDS, do_sample=False, num_beams=2, max_new_tokens=3),
    "a draft": lambda model: model.generate(
        IDS[:1], do_sample=False, assistant_model=make_model("llama", "gqa"), max_new_tokens=3
    ),
    "pieces": lambda model: model.generate(
        IDS, do_sample=False, prefill_chunk_size=4, max_new_tokens=3
    ),
    "offloaded": lambda model: model(IDS, past_key_values=offloading()),
}


def offloading() -> Cache:
    """As transformers makes it where there is a GPU."""
    cache = DynamicCache()
    cache.offloading = True
    return cache


def gpt2(model: Any) -> bool:
    return "gpt2" in model.config.model_type


@two_backbones
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("change", [without, in_a_box], ids=lambda change: change.__name__)
@pytest.mark.parametrize("blocks", [(0, 1), (1,)], ids=["every block", "one block"])
def test_a_cache_that_does_not_arrive_is_an_error(
    backbone: str,
    way: str,
    change: Change,
    blocks: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model(backbone, "gqa")
    WAYS[way](model)
    hand_on(monkeypatch, change, blocks)
    with pytest.raises(
        ValueError, match=r"wrong; transformers \d.* is installed; tested: 5\.20 to 5\."
    ) as refused:
        WAYS[way](model)
    assert "\n" not in str(refused.value)
    model(IDS, use_cache=False)


@two_backbones
def test_a_block_that_should_use_a_cache_says_that_it_has_none(
    backbone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the model around the blocks, too."""
    model = make_model(backbone, "gqa")
    hand_on(
        monkeypatch,
        lambda given: {key: value for key, value in given.items() if not isinstance(value, Cache)},
    )
    with pytest.raises(ValueError, match="layer 0 should use a cache and was given none"):
        model.base_model(IDS, use_cache=True)
    with pytest.raises(ValueError, match="layer 3 should use a cache"):
        AttentionAdapter(nn.Identity(), layer_idx=3)(torch.zeros(1, 2, 8), use_cache=True)  # pyright: ignore


def test_a_cache_that_took_in_too_much_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block that runs twice in one call."""
    real, model = StateLayer.attend, make_model("llama", "gqa")
    last = mechanisms(model)[-1]

    def twice(layer: StateLayer, attention: Any, *given: Any) -> torch.Tensor:
        if attention is last:
            real(layer, attention, *given)
        return real(layer, attention, *given)

    monkeypatch.setattr(StateLayer, "attend", twice)
    with pytest.raises(ValueError, match="layer 1 took in 28 of the call's 14 columns"):
        model(IDS)


# ---- where there is rightly no cache, or not in every block


@two_backbones
def test_gradient_checkpointing_in_training(backbone: str) -> None:
    """transformers switches the cache off there: no cache comes out, and one that goes in is
    refused."""
    model = make_model(backbone, "fmka").train()
    checkpoint_blocks(model)
    for more in ({}, {"use_cache": True}):
        output = model(IDS, labels=IDS, **more)
        assert versions.cache_of(output) is None
        output.loss.backward()
    with pytest.raises(ValueError, match="gradient checkpointing leaves the cache out: use"):
        model(IDS, past_key_values=DynamicCache())
    checks.close(in_two_calls(model.eval(), DynamicCache()), model(IDS, use_cache=False).logits)


def test_a_block_without_attention_needs_no_cache() -> None:
    model = make_model("llama", "gqa", dtype=torch.float64)

    class Skipped(nn.Module):
        def forward(self, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
            return hidden_states

    model.model.layers[1] = Skipped()
    checks.close(in_two_calls(model, None, use_cache=True), model(IDS, use_cache=False).logits)


def test_a_draft_of_the_models_first_blocks() -> None:
    model = make_model("llama", "fmka", dtype=torch.float64)
    given = model.generate(IDS[:1], do_sample=False, max_new_tokens=12, assistant_early_exit=1)
    assert torch.equal(given, greedy_without_cache(model, IDS[:1], 12))
