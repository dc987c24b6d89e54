"""A converted model starts where the pretrained one stood, and can learn."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

import checks
from checks_models import BACKBONES, LLAMA, TOKEN_IDS, shake, tokens
from mka.memory.router import Router
from mka.models import MODELS, build_model, convert, mechanisms

every_backbone = pytest.mark.parametrize("backbone", BACKBONES)
LENGTH = 30
OWN_WINDOW = {"mistral": 9}
"""Where the backbone's attention has a window itself, a converted one keeps it."""


def pretrained(backbone: str) -> Any:
    return shake(AutoModelForCausalLM.from_config(BACKBONES[backbone]))


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


@every_backbone
def test_gqa_with_the_models_own_groups_changes_nothing(backbone: str) -> None:
    model, ids = pretrained(backbone), tokens(2, LENGTH)
    converted = convert(model, "gqa")
    assert type(converted) in MODELS.values()
    checks.close(logits(converted, ids), logits(model, ids))


@every_backbone
def test_mha_repeats_the_heads_of_a_group(backbone: str) -> None:
    model, ids = pretrained(backbone), tokens(2, LENGTH)
    checks.close(logits(convert(model, "mha"), ids), logits(model, ids))


@every_backbone
@pytest.mark.parametrize("kind", ["mka", "fmka"])
def test_within_the_window_a_memory_changes_nothing(backbone: str, kind: str) -> None:
    model, ids = pretrained(backbone), tokens(2, LENGTH)
    window = OWN_WINDOW.get(backbone, LENGTH)
    converted = convert(model, kind, local_window=window, chunk_size=4, top_k=2)
    short = ids[:, :window] if kind == "mka" else ids  # joint memories are open from the start
    checks.close(logits(converted, short), logits(model, short))
    longer = tokens(2, 60)
    same = torch.allclose(logits(converted, longer), logits(model, longer), atol=1e-4)
    assert same == (
        backbone in OWN_WINDOW and kind == "fmka"
    )  # beyond the window it sees other tokens


@every_backbone
def test_with_everything_retrieved_it_is_the_pretrained_model_at_any_length(backbone: str) -> None:
    """But for a backbone with a window of its own: there it sees more."""
    model, ids = pretrained(backbone), tokens(2, 60)
    converted = convert(model, "mka", local_window=9, chunk_size=4, top_k=60)
    assert torch.allclose(logits(converted, ids), logits(model, ids), atol=1e-5) == (
        backbone not in OWN_WINDOW
    )


def test_the_distance_that_a_model_was_made_for_bounds_its_memory() -> None:
    model = pretrained("llama")
    limit = model.config.max_position_embeddings
    attn = mechanisms(convert(model, "mka", local_window=9, chunk_size=4))[0]
    assert attn.max_distance == limit
    assert mechanisms(convert(model, "gqa", local_window=9))[0].max_distance == limit
    assert (
        mechanisms(convert(model, "mka", local_window=limit, chunk_size=4))[0].max_distance is None
    )
    assert mechanisms(convert(pretrained("gpt2"), "mka", local_window=9))[0].max_distance is None


@pytest.mark.parametrize("kind", ["mka", "fmka"])
@pytest.mark.parametrize("backbone", ["gpt2", "llama", "qwen3"])
def test_the_gate_learns_from_the_first_step_and_everything_behind_it_from_the_third(
    backbone: str, kind: str
) -> None:
    """The gate at 0 hides the memories and the router; the router's output at 0 hides its hidden
    layer."""
    converted = convert(pretrained(backbone), kind, local_window=8, chunk_size=4, top_k=2).train()
    optimizer = torch.optim.AdamW(converted.parameters(), lr=1e-2)
    gates = [module.gate for module in converted.modules() if isinstance(module, Router)]
    assert [gate.item() for gate in gates] == [0.0, 0.0]
    for step in range(3):
        ids = tokens(4, LENGTH, seed=step)
        optimizer.zero_grad()
        converted(ids, labels=ids, use_cache=False).loss.backward()
        assert all(gate.grad is not None and gate.grad != 0 for gate in gates)
        optimizer.step()
    idle = [name for name, p in converted.named_parameters() if p.grad is None or not p.grad.any()]
    shut = () if kind == "fmka" else ("decay_logit",)  # of a session whose gate has moved below 0
    assert not [
        name for name in idle if not name.endswith(("k_proj.bias", *shut))
    ]  # softmax has no gradient for it


def test_fewer_groups_are_averages() -> None:
    model = pretrained("llama")
    k = model.model.layers[0].self_attn.k_proj.weight
    mqa = mechanisms(convert(model, "mqa"))[0]
    torch.testing.assert_close(mqa.get_parameter("k_proj.weight"), k.unflatten(0, (2, -1)).mean(0))
    again = convert(convert(model, "mha"), "gqa", num_kv_heads=2)
    checks.close(logits(again, tokens(1, 9)), logits(model, tokens(1, 9)))


def test_what_was_converted_can_be_converted_on() -> None:
    model, ids = pretrained("mistral"), tokens(1, LENGTH)
    checks.close(logits(convert(convert(model, "gqa"), "mha"), ids), logits(model, ids))
    checks.close(
        logits(convert(convert(model, "fmka", local_window=9), "gqa"), ids), logits(model, ids)
    )
    refused("model holds MultiHeadLatentAttention", build_model(BACKBONES["llama"], "mla"))


def test_the_model_given_stays_as_it_is() -> None:
    model, ids = pretrained("llama"), tokens(1, 9)
    before = logits(model, ids)
    converted = convert(model, "fmka")
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.zero_()
    checks.close(logits(model, ids), before)
    assert model.config.model_type == "llama"


def test_sampling_settings_and_dtype_are_kept() -> None:
    model = pretrained("gpt2").to(torch.bfloat16)
    model.generation_config.temperature = 0.3
    converted = convert(model, "mka")
    assert converted.dtype == torch.bfloat16
    assert converted.generation_config.temperature == 0.3


def refused(message: str, model: Any, kind: str = "fmka", **options: Any) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        convert(model, kind, **options)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_converted_is_said_in_one_line() -> None:
    neox = GPTNeoXForCausalLM(
        GPTNeoXConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=9)
    )
    refused("model_type is 'gpt_neox'; allowed: gpt2, llama, mistral, qwen2, qwen3", neox)
    refused(
        "attention is 'mla'; a pretrained model can become: mha, mqa, gqa, mka, fmka",
        pretrained("llama"),
        "mla",
    )
    refused(
        "num_kv_heads is 4; it must divide the model's 3|num_kv_heads is 4",
        three_groups(),
        "gqa",
        num_kv_heads=4,
    )
    refused("fmka has no option 'windw'; .*nearest: 'local_window'", pretrained("gpt2"), windw=3)
    refused(
        "max_distance is 90; gpt2 has no rotary positions",
        pretrained("gpt2"),
        local_window=8,
        max_distance=90,
    )
    refused("bias is decided by the backbone's configuration", pretrained("gpt2"), bias=True)
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    refused(
        "rope_type is 'dynamic'",
        LlamaForCausalLM(LlamaConfig(**LLAMA, **TOKEN_IDS, rope_parameters=rope)),
    )
    config: Any = deepcopy(BACKBONES["gpt2"])
    config.scale_attn_by_inverse_layer_idx = True
    refused("scale_attn_by_inverse_layer_idx is True", AutoModelForCausalLM.from_config(config))


def three_groups() -> Any:
    sizes = LLAMA | {"hidden_size": 48, "num_attention_heads": 12, "num_key_value_heads": 3}
    return LlamaForCausalLM(LlamaConfig(**sizes, **TOKEN_IDS))


@pytest.mark.parametrize(
    "name", ["local_window", "sink_tokens", "chunk_size", "top_k", "max_distance", "num_kv_heads"]
)
@pytest.mark.parametrize("value", ["big", 2.5, True])
def test_what_counts_is_a_whole_number(name: str, value: Any) -> None:
    refused(
        f"{name} is {value!r}; it must be a whole number",
        pretrained("llama"),
        "mka",
        **{name: value},
    )


def test_an_unknown_option_is_told_of_all_that_there_are() -> None:
    refused(
        "mka has no option 'memory_layer'; allowed: .*nearest: 'memory_layers'",
        pretrained("llama"),
        "mka",
        memory_layer=2,
    )
