"""What people do with caches: copy them, fill them in another mode, take back long drafts."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from checks_models import LLAMA, make_model, shake, tokens
from mka.attention import ATTENTION_TYPES
from mka.errors import InputError
from mka.memory.options import STORES, LongTermConfig
from mka.models import CACHE_ARGUMENT, build_model, convert, memory_cache, states
from mka.models.cache import REVERSIBLE
from mka.models.drafts import longest_draft

MEMORIES = [(kind, store) for kind in ("mka", "fmka") for store in STORES]
OTHERS = [(kind, "device") for kind in ATTENTION_TYPES if kind not in ("mka", "fmka")]
every_store = pytest.mark.parametrize(("kind", "store"), [*MEMORIES, *OTHERS])
PLAIN: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def called(model: Any, ids: Tensor, cache: Any) -> Tensor:
    return model(ids, use_cache=True, **{CACHE_ARGUMENT: cache}).logits


@every_store
@torch.no_grad()
def test_a_copy_of_a_cache_is_a_cache_of_its_own(kind: str, store: Any) -> None:
    model, ids = make_model("llama", kind, True, torch.float64), tokens(1, 60)
    whole = model(ids).logits
    cache = memory_cache(model, LongTermConfig(longterm_store=store))
    called(model, ids[:, :40], cache)
    for _ in range(2):
        copied = copy.deepcopy(cache)
        torch.testing.assert_close(
            called(model, ids[:, 40:], copied), whole[:, 40:], rtol=1e-12, atol=1e-12
        )
    # Nothing of it reached the first one, and the other way round.
    torch.testing.assert_close(
        called(model, ids[:, 40:], cache), whole[:, 40:], rtol=1e-12, atol=1e-12
    )


@torch.no_grad()
def test_copies_of_a_cache_on_disk_have_a_limit_of_their_own() -> None:
    model, ids = make_model("llama", "mka", True, torch.float64), tokens(1, 60)
    config = LongTermConfig(longterm_store="disk", longterm_gib=1.0)
    cache = memory_cache(model, config)
    called(model, ids, cache)
    budget = states(cache)[0].longterm.budget
    used, copied = budget.used, copy.deepcopy(cache)
    theirs = states(copied)[0].longterm.budget
    assert theirs is not budget
    assert used == theirs.used > 0
    assert {id(state.longterm.budget) for state in states(copied)} == {id(theirs)}
    del copied, cache
    assert (budget.used, theirs.used) == (0, 0)


@every_store
@pytest.mark.parametrize("rearranged", [False, True])
def test_a_cache_filled_in_inference_mode_goes_on_outside(
    kind: str, store: Any, rearranged: bool
) -> None:
    model, ids = make_model("llama", kind, True, torch.float64), tokens(2, 60)
    cache = memory_cache(model, LongTermConfig(longterm_store=store))
    with torch.inference_mode():
        whole = model(ids).logits
        called(model, ids[:, :25], cache)
        called(model, ids[:, 25:40], cache)
        if rearranged:
            cache.batch_select_indices(torch.tensor([1, 0]))
            ids, whole = ids.flip(0), whole.flip(0)
    with torch.no_grad():
        found = called(model, ids[:, 40:], cache)
    torch.testing.assert_close(found, whole[:, 40:].clone(), rtol=1e-12, atol=1e-12)


def draft_of(schedule: str, size: int) -> Any:
    draft = make_model("llama", "gqa", False, torch.float64)
    settings = draft.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = size, schedule
    settings.assistant_confidence_threshold = 0
    return draft


DRAFTS: dict[str, Any] = {
    "looked up, one below": {"prompt_lookup_num_tokens": REVERSIBLE - 1},
    "looked up, as many": {"prompt_lookup_num_tokens": REVERSIBLE},
    "looked up, more": {"prompt_lookup_num_tokens": REVERSIBLE + 16},
    "drafted, more": ("constant", REVERSIBLE + 36),
    "drafted, longer each time": ("heuristic", REVERSIBLE - 2),
}


@pytest.mark.parametrize("name", DRAFTS)
@pytest.mark.parametrize("kind", ["mka", "fmka"])
@torch.no_grad()
def test_a_draft_of_any_length_can_be_taken_back(kind: str, name: str) -> None:
    model, ids = make_model("llama", kind, True, torch.float64), tokens(1, 30).repeat(1, 4)
    how = DRAFTS[name]
    options = {"assistant_model": draft_of(*how)} if isinstance(how, tuple) else how
    wanted = model.generate(ids, max_new_tokens=100, **PLAIN)
    assert torch.equal(model.generate(ids, max_new_tokens=100, **PLAIN, **options), wanted)


@torch.no_grad()
def test_a_mechanism_that_drafts_can_take_back_its_own() -> None:
    model, ids = make_model("llama", "mha", False, torch.float64), tokens(1, 30)
    draft = make_model("llama", "mka", True, torch.float64)
    draft.generation_config.num_assistant_tokens = REVERSIBLE + 20
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0
    wanted = model.generate(ids, max_new_tokens=100, **PLAIN)
    given = model.generate(ids, max_new_tokens=100, assistant_model=draft, **PLAIN)
    assert torch.equal(given, wanted)


def test_how_far_a_draft_that_grows_can_get() -> None:
    """By what transformers does: 2 tokens more after each draft that was right."""
    model, draft = make_model("llama", "mka", True, torch.float64), draft_of("heuristic", 5)
    for most in (1, 2, 10, 99, 1000):
        size, written = 5, 0
        while written < most:
            written, size = written + size + 1, size + 2
        assert longest_draft(model, {"assistant_model": draft, "max_new_tokens": most}) >= size - 2


@torch.no_grad()
def test_a_given_cache_has_to_be_made_for_the_draft() -> None:
    model, ids = make_model("llama", "mka", True, torch.float64), tokens(1, 30).repeat(1, 4)
    plain = {**PLAIN, "max_new_tokens": 100, "prompt_lookup_num_tokens": 100}
    with pytest.raises(InputError, match=r"made with reversible=64; .*reversible=101\)"):
        model.generate(ids, **plain, **{CACHE_ARGUMENT: memory_cache(model)})
    cache = memory_cache(model, reversible=101)
    wanted = model.generate(ids, max_new_tokens=100, **PLAIN)
    assert torch.equal(model.generate(ids, **plain, **{CACHE_ARGUMENT: cache}), wanted)


@pytest.mark.parametrize("value", [-1, 1.5, True, 10**30, "64"])
def test_how_many_tokens_can_be_taken_back_is_a_whole_number(value: Any) -> None:
    with pytest.raises(InputError, match="reversible is "):
        memory_cache(make_model("llama", "mka", True, torch.float64), reversible=value)


@pytest.mark.parametrize("name", ["eager", "sdpa", {"": "eager"}])
def test_another_implementation_of_attention_is_refused(name: Any) -> None:
    model, ids = make_model("llama", "mka", True, torch.float64), tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    wanted = model(ids, attention_mask=mask).logits
    with pytest.raises(InputError, match="computes attention itself"):
        model.set_attn_implementation(name)
    assert torch.equal(model(ids, attention_mask=mask).logits, wanted)
    model.set_attn_implementation(model.config._attn_implementation)


def test_what_was_read_from_gguf_is_not_quantized(tmp_path: Any) -> None:
    sizes: dict[str, Any] = LLAMA
    pretrained = shake(build_model(LlamaConfig(**sizes), "mha"))
    pretrained.config.quantization_config = {"quant_method": "gguf", "gguf_file": "m.gguf"}
    converted = convert(pretrained, "mka")
    assert not hasattr(converted.config, "quantization_config")
    converted.save_pretrained(tmp_path / "once")
    again = type(converted).from_pretrained(tmp_path / "once")
    again.save_pretrained(tmp_path / "twice")
    assert (tmp_path / "twice" / "model.safetensors").is_file()
