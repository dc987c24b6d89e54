"""GPT-2's initialization, whatever the mechanism, and what two mechanisms of one seed share."""

import math

import pytest
import torch
from transformers import GPT2LMHeadModel

from mka.attention import ATTENTION_TYPES
from mka.memory.router import Router
from mka.models import build_model, gpt2_config, mechanisms

SIZES = {"hidden_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 500}
CONFIG = gpt2_config(**SIZES, max_position_embeddings=64)
STD = 0.02
RESIDUAL_STD = STD / math.sqrt(2 * SIZES["num_hidden_layers"])
every_kind = pytest.mark.parametrize("kind", ATTENTION_TYPES)


def expected_std(name: str) -> float:
    return RESIDUAL_STD if name.endswith(("attention.o_proj.weight", "mlp.c_proj.weight")) else STD


@every_kind
def test_weights_are_normal_and_residual_projections_scaled(kind: str) -> None:
    model = build_model(CONFIG, kind)
    matrices = {
        name: p
        for name, p in model.named_parameters()
        if p.dim() == 2 and "router.output" not in name
    }
    assert len(matrices) >= 2 + 3 * (2 + 4)
    for name, weight in matrices.items():
        # The standard error of a standard deviation of n numbers is std / sqrt(2 n): six of them.
        slack = 6 / math.sqrt(2 * weight.numel())
        assert abs(weight.std().item() / expected_std(name) - 1) < slack, name
        assert abs(weight.mean().item()) < 6 * expected_std(name) / math.sqrt(weight.numel()), name


@every_kind
def test_biases_are_zero_and_norms_one(kind: str) -> None:
    model = build_model(CONFIG, kind)
    for name, p in model.named_parameters():
        if name.endswith(("ln_1.weight", "ln_2.weight", "ln_f.weight", "_norm.weight")):
            assert (p == 1).all(), name
        elif name.endswith("bias") and "router.output" not in name:
            assert (p == 0).all(), name


@pytest.mark.parametrize("kind", ["mka", "fmka"])
def test_the_router_starts_from_its_bias_alone(kind: str) -> None:
    routers = [
        module for module in build_model(CONFIG, kind).modules() if isinstance(module, Router)
    ]
    assert len(routers) == SIZES["num_hidden_layers"]
    for router in routers:
        assert (router.output.weight == 0).all()
        start = [0, 0, 0] * SIZES["num_attention_heads"] if kind == "mka" else [3, 0, 0]
        assert router.output.bias.tolist() == start
        assert router.hidden.weight.std() > 0
        assert router.gate == 1
        assert not isinstance(router.gate, torch.nn.Parameter)


@every_kind
def test_the_same_seed_shares_everything_but_the_attention(kind: str) -> None:
    model, mha = build_model(CONFIG, kind, seed=7), build_model(CONFIG, "mha", seed=7)
    outside = {name: p for name, p in mha.named_parameters() if ".attn." not in name}
    assert len(outside) == 2 + 2 + 3 * 8
    for name, p in outside.items():
        assert torch.equal(model.get_parameter(name), p), name
    other = build_model(CONFIG, kind, seed=8)
    assert not torch.equal(model.transformer.wte.weight, other.transformer.wte.weight)


@every_kind
def test_the_same_seed_gives_the_same_bytes(kind: str) -> None:
    first, second = (build_model(CONFIG, kind, seed=3) for _ in range(2))
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_building_leaves_the_random_numbers_of_others_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    build_model(CONFIG, "fmka")
    assert torch.equal(torch.rand(3), expected)


def test_layers_differ_from_each_other_and_the_head_is_the_embedding() -> None:
    model = build_model(CONFIG, "gqa")
    first, second, _ = mechanisms(model)
    assert not torch.equal(
        first.get_parameter("q_proj.weight"), second.get_parameter("q_proj.weight")
    )
    assert isinstance(model, GPT2LMHeadModel)
    assert model.lm_head.weight is model.transformer.wte.weight
