"""Presets have the parameters they claim, and widths matched to mha bring every mechanism to its
size."""

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mka.attention import ATTENTION_TYPES
from mka.errors import InputError
from mka.experiments.budgets import (
    CACHE_TOLERANCE,
    match_cache,
    matched_intermediate_size,
    model_flops,
)
from mka.models import build_model, gpt2_config, mechanisms, preset_config
from mka.record.config import PRESETS, BenchmarkConfig, attention_options

CLAIMED_MILLIONS = {"quick": 5, "small": 14, "gpt2": 124}
ALLOWED_DIFFERENCE = 0.005


def sizes(name: str) -> GPT2Config:
    return preset_config(PRESETS[name])


def empty_model(kind: str, config: GPT2Config, **options: Any) -> GPT2LMHeadModel:
    """Shapes without numbers."""
    with torch.device("meta"):
        return build_model(config, kind, **options)


def count(model: GPT2LMHeadModel) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_parameters_it_claims(name: str) -> None:
    assert round(count(empty_model("mha", sizes(name))) / 1e6) == CLAIMED_MILLIONS[name]


def test_the_gpt2_preset_is_gpt2() -> None:
    with torch.device("meta"):
        theirs = GPT2LMHeadModel(GPT2Config())
    assert count(empty_model("mha", sizes("gpt2"))) == count(theirs) == 124_439_808


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("kind", ATTENTION_TYPES)
def test_every_mechanism_builds_in_every_preset(name: str, kind: str) -> None:
    preset = PRESETS[name]
    options = attention_options(kind, BenchmarkConfig(preset=name).resolved())
    model = empty_model(kind, sizes(name), **options)
    assert len(mechanisms(model)) == preset.num_hidden_layers
    attention = sum(p.numel() for attn in mechanisms(model) for p in attn.parameters())
    assert attention == sum(attn.num_parameters for attn in mechanisms(model))
    assert {type(attn) for attn in mechanisms(model)} == {ATTENTION_TYPES[kind]}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("kind", ATTENTION_TYPES)
@pytest.mark.parametrize("match", ["parameters", "flops"])
def test_a_matched_mlp_makes_up_for_the_mechanism(match: Any, kind: str, name: str) -> None:
    config, cost = sizes(name), {"parameters": count, "flops": model_flops}[match]
    options = attention_options(kind, BenchmarkConfig(preset=name).resolved())
    wanted = cost(empty_model("mha", config))
    config.n_inner = matched_intermediate_size(kind, config, match, **options)
    assert config.n_inner % 8 == 0
    assert abs(cost(empty_model(kind, config, **options)) / wanted - 1) <= ALLOWED_DIFFERENCE


def test_flops_by_hand() -> None:
    """mha, C = 32, T = 40, two blocks: projections, scores and values of 20.5 tokens on average,
    MLP, head."""
    config = gpt2_config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=50,
        max_position_embeddings=40,
    )
    block = 4 * 2 * 32 * 32 + 2 * 2 * 32 * 20.5 + 2 * 2 * 32 * 128
    assert model_flops(empty_model("mha", config)) == 2 * block + 2 * 32 * 50


def test_what_no_mlp_can_make_up_for_is_said() -> None:
    config = sizes("quick")
    with pytest.raises(InputError, match="mla alone costs more than mha with its MLP"):
        matched_intermediate_size("mla", config, kv_lora_rank=8192)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("kind", ATTENTION_TYPES)
def test_matched_heads_give_the_cache_of_gqa(kind: str, name: str) -> None:
    config, groups = sizes(name), 4
    options: dict[str, Any] = attention_options(kind, BenchmarkConfig(preset=name).resolved())

    def cache(model: Any) -> int:
        return sum(
            attn.state_nbytes(1, config.n_positions, torch.bfloat16) for attn in mechanisms(model)
        )

    wanted = cache(empty_model("gqa", config, num_kv_heads=groups))
    assert kind == "gqa" or abs(cache(empty_model(kind, config, **options)) / wanted - 1) > 0.05
    options = match_cache(kind, config, groups, **options)
    model = empty_model(kind, config, **options)
    assert abs(cache(model) / wanted - 1) <= CACHE_TOLERANCE
    with torch.device("meta"):
        again = type(model)(model.config.from_dict(model.config.to_dict()))
    assert count(again) == count(model), "a saved configuration gives the same model"


def test_a_cache_that_cannot_be_reached_is_said() -> None:
    with pytest.raises(
        InputError,
        match=r"match is 'cache'; mka .* bytes per token and layer at the nearest size, gqa with 1",
    ):
        match_cache("mka", sizes("quick"), 1, session_stride=1, session_slots=None, chunk_size=1)


def test_matching_starts_from_the_width_that_was_given() -> None:
    config = sizes("quick")
    config.n_inner = 640
    assert matched_intermediate_size("mha", config) == 640


@pytest.mark.parametrize("kind", ATTENTION_TYPES)
def test_a_small_model_computes(kind: str) -> None:
    config = gpt2_config(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=50,
        max_position_embeddings=40,
    )
    tokens = torch.randint(50, (2, 40), generator=torch.Generator().manual_seed(0))
    options: dict[str, Any] = attention_options(kind, BenchmarkConfig(local_window=8))
    logits = build_model(config, kind, **options)(tokens).logits
    assert logits.shape == (2, 40, 50)
    assert logits.isfinite().all()
