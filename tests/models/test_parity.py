"""With mha and copied weights the logits are those of transformers' GPT-2."""

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from checks import close
from mka.models import build_model, gpt2_config, mechanisms

SIZES = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 61}
TOKENS = 33


def transformers_gpt2(implementation: str) -> GPT2LMHeadModel:
    """Every parameter random, norms and biases too."""
    config = gpt2_config(**SIZES, max_position_embeddings=64)
    config._attn_implementation = implementation
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model


def copied_from(theirs: GPT2LMHeadModel) -> GPT2LMHeadModel:
    ours = build_model(theirs.config, "mha").eval()
    weights = {name: x for name, x in theirs.state_dict().items() if ".attn." not in name}
    missing, unexpected = ours.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(".attn.attention." in name for name in missing)
    for layer, attn in enumerate(mechanisms(ours)):
        theirs_of = theirs.get_submodule(f"transformer.h.{layer}.attn").get_parameter
        # Conv1D keeps (inputs, outputs), and queries, keys and values side by side.
        weights = [*theirs_of("c_attn.weight").T.chunk(3), theirs_of("c_proj.weight").T]
        biases = [*theirs_of("c_attn.bias").chunk(3), theirs_of("c_proj.bias")]
        for name, weight, bias in zip("qkvo", weights, biases, strict=True):
            project = attn.get_submodule(f"{name}_proj")
            project.load_state_dict({"weight": weight, "bias": bias})
    return ours


def tokens(batch: int = 3) -> Tensor:
    return torch.randint(
        SIZES["vocab_size"], (batch, TOKENS), generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_logits(implementation: str) -> None:
    theirs = transformers_gpt2(implementation)
    with torch.no_grad():
        close(copied_from(theirs)(tokens()).logits, theirs(tokens()).logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_of_a_padded_batch(implementation: str, side: str) -> None:
    theirs = transformers_gpt2(implementation)
    mask = torch.arange(TOKENS) < torch.tensor([TOKENS, 20, 1])[:, None]
    mask = mask.flip(1) if side == "left" else mask
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    inputs = {"input_ids": tokens(), "attention_mask": mask.long(), "position_ids": positions}
    with torch.no_grad():
        ours, expected = copied_from(theirs)(**inputs).logits, theirs(**inputs).logits
    close(ours[mask], expected[mask])


def test_gradients_of_the_loss() -> None:
    theirs = transformers_gpt2("eager")
    ours = copied_from(theirs)
    for model in (ours, theirs):
        model(tokens(), labels=tokens()).loss.backward()
    for name in (
        "transformer.wte.weight",
        "transformer.h.0.ln_1.weight",
        "transformer.h.2.mlp.c_fc.weight",
    ):
        close(gradient(ours, name), gradient(theirs, name))
    for layer, attn in enumerate(mechanisms(ours)):
        packed = torch.cat([gradient(attn, f"{name}_proj.weight") for name in "qkv"])
        close(packed, gradient(theirs, f"transformer.h.{layer}.attn.c_attn.weight").T)


def gradient(module: nn.Module, name: str) -> Tensor:
    grad = module.get_parameter(name).grad
    assert grad is not None
    return grad
