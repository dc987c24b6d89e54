"""A cache of transformers that carries our states: in calls, padded, cropped, reordered."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache

import checks
from checks_models import BACKBONES, TWO_BACKBONES, make_model, positions_of, tokens
from checks_state import SIDES, TOKENS, many_calls, padding, two_calls
from mka.attention import ATTENTION_TYPES
from mka.models import CACHE_ARGUMENT, StateLayer, cache_of, mechanisms, states

every_kind = pytest.mark.parametrize("kind", ATTENTION_TYPES)
two_backbones = pytest.mark.parametrize("backbone", TWO_BACKBONES)


@torch.no_grad()
def in_calls(
    model: Any, ids: torch.Tensor, cuts: Any, mask: torch.Tensor | None, cache: Any = None
) -> Any:
    """Logits of several calls side by side, and the cache; with a mask, positions that count each
    row's tokens."""
    start, logits = 0, []
    before = 0 if cache is None else cache.get_seq_length()
    for stop in [*cuts, ids.shape[1]]:
        if stop == start:
            continue
        more = {}
        if mask is not None:
            more = {
                "attention_mask": mask[:, : before + stop],
                "position_ids": positions_of(mask)[:, before + start : before + stop],
            }
        given = model(ids[:, start:stop], past_key_values=cache, use_cache=True, **more)
        logits, cache, start = [*logits, given.logits], given.past_key_values, stop
    return torch.cat(logits, dim=1), cache


@every_kind
@two_backbones
@pytest.mark.parametrize("windowed", [True, False], ids=["window", "no window"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    "dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str
)
def test_splits_change_nothing(
    kind: str, backbone: str, windowed: bool, side: str, dtype: torch.dtype
) -> None:
    """In float32 every chunk is retrieved, so that rounding cannot choose another."""
    changes: dict[str, Any] = (
        {"top_k": 100} if kind in ("mka", "fmka") and dtype == torch.float32 else {}
    )
    model, ids, mask = (
        make_model(backbone, kind, windowed, dtype, **changes),
        tokens(3, TOKENS),
        padding(side, 3),
    )
    whole, _ = in_calls(model, ids, (), mask)
    kept = torch.ones(3, TOKENS, dtype=torch.bool) if mask is None else mask
    for cuts in [*two_calls(), *many_calls()]:
        logits, _ = in_calls(model, ids, cuts, mask)
        checks.close(logits[kept], whole[kept])


@every_kind
@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_backbone_in_calls(kind: str, backbone: str) -> None:
    model, ids = make_model(backbone, kind, dtype=torch.float64), tokens(2, TOKENS)
    whole = model(ids, use_cache=False).logits
    logits, cache = in_calls(model, ids, (7, 8, 20), None)
    checks.close(logits, whole)
    assert cache.get_seq_length() == TOKENS
    assert len(states(cache)) == len(mechanisms(model)) == 2
    for state, attention in zip(states(cache), mechanisms(model), strict=True):
        assert state.nbytes == attention.state_nbytes(2, TOKENS, reversible=64)


@every_kind
def test_crop_takes_columns_back_padding_included(kind: str) -> None:
    model, ids, mask = (
        make_model("llama", kind, dtype=torch.float64),
        tokens(3, TOKENS),
        padding("interior", 3),
    )
    assert mask is not None
    whole, _ = in_calls(model, ids, (), mask)
    _, cache = in_calls(
        model, torch.cat([ids[:, :20], tokens(3, 13, seed=4)], dim=1), (9, 15), mask
    )
    cache.crop(-13)
    assert cache.get_seq_length() == 20
    assert states(cache)[0].num_tokens.tolist() == mask[:, :20].sum(1).tolist()
    logits, _ = in_calls(model, ids[:, 20:], (1, 2), mask, cache)
    checks.close(logits[mask[:, 20:]], whole[:, 20:][mask[:, 20:]])


@every_kind
def test_rows_of_a_cache_can_be_chosen(kind: str) -> None:
    model, ids = make_model("gpt2", kind, dtype=torch.float64), tokens(2, 20)
    whole = model(ids, use_cache=False).logits
    _, cache = in_calls(model, ids[:, :12], (5,), None)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    cache.batch_select_indices(torch.tensor([0, 1]))
    assert cache.batch_size == 2
    checks.close(in_calls(model, ids[[1, 0], 12:], (), None, cache)[0], whole[[1, 0], 12:])


@every_kind
def test_reset_and_offloading(kind: str) -> None:
    model, ids = make_model("gpt2", kind), tokens(2, 9)
    _, cache = in_calls(model, ids, (4,), None)
    for layer in cache.layers:
        layer.offload()
        layer.prefetch()
    cache.reset()
    assert cache.get_seq_length() == 0
    checks.close(in_calls(model, ids, (3,), None, cache)[0], model(ids, use_cache=False).logits)


def test_crop_beyond_what_is_reversible_names_the_limit() -> None:
    model = make_model("gpt2", "fmka")
    _, cache = in_calls(model, tokens(1, 100), (50,), None)
    cache.crop(-60)
    with pytest.raises(ValueError, match=r"num_tokens is 30; .*36 tokens or more: .*reversible=64"):
        cache.crop(-10)


def test_a_cache_of_another_model_is_refused() -> None:
    ids, theirs = tokens(1, 5), AutoModelForCausalLM.from_config(BACKBONES["gpt2"])
    filled = cache_of(theirs(ids, use_cache=True))
    model = make_model("gpt2", "gqa")
    with pytest.raises(ValueError, match="holds a DynamicLayer of another model's keys"):
        model(ids, past_key_values=filled, use_cache=True)
    _, ours = in_calls(model, ids, (), None)
    with pytest.raises(TypeError, match=r"belongs to a model of mka\.models"):
        theirs(ids, use_cache=True, **{CACHE_ARGUMENT: ours})
    with pytest.raises(ValueError, match="the state belongs to GroupedQueryAttention"):
        make_model("gpt2", "fmka")(ids, past_key_values=ours, use_cache=True)
    with pytest.raises(ValueError, match="holds 1 rows; x has 2"):
        model(tokens(2, 5), past_key_values=ours, use_cache=True)


def test_a_cache_made_without_a_configuration_will_do() -> None:
    model, ids = make_model("gpt2", "mka"), tokens(2, 9)
    logits, cache = in_calls(model, ids, (4,), None, DynamicCache())
    checks.close(logits, model(ids, use_cache=False).logits)
    assert all(isinstance(layer, StateLayer) for layer in cache.layers)


def test_a_mask_of_another_form_is_refused() -> None:
    with pytest.raises(
        ValueError, match="it must be \\(rows, columns\\), zeros at padding, with 2 rows"
    ):
        make_model("gpt2", "mha")(tokens(2, 5), attention_mask=torch.ones(2, 1, 5, 5))
