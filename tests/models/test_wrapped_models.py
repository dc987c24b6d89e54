"""Models whose layers were adapted, offloaded or quantized by other libraries: decoding is the
whole pass still."""

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import checks
from checks_models import LLAMA, make_model, shake, tokens
from mka.attention import ATTENTION_TYPES
from mka.models import mechanisms

KINDS = list(ATTENTION_TYPES)
every_kind = pytest.mark.parametrize("kind", KINDS)
pytestmark = pytest.mark.filterwarnings("ignore")  # those of the other libraries


def linear_names(model: nn.Module) -> list[str]:
    """The last names of the layers inside the mechanisms."""
    found = {
        name
        for attn in mechanisms(model)
        for name, module in attn.named_modules()
        if isinstance(module, nn.Linear)
    }
    return sorted(found)


@torch.no_grad()
def in_two_calls(model: Any, ids: Tensor, cut: int = 11) -> Tensor:
    first = model(input_ids=ids[:, :cut], use_cache=True)
    rest = model(input_ids=ids[:, cut:], past_key_values=first.past_key_values, use_cache=True)
    return torch.cat([first.logits, rest.logits], dim=1)


def adapted(model: Any, targets: list[str]) -> Any:
    torch.manual_seed(1)
    options: Any = {"r": 3, "lora_alpha": 24, "target_modules": targets, "init_lora_weights": False}
    return get_peft_model(model, LoraConfig(**options, task_type="CAUSAL_LM")).eval()


@pytest.mark.parametrize("backbone", ["llama", "qwen3"])
@every_kind
@torch.no_grad()
def test_adapters_on_every_layer(backbone: str, kind: str) -> None:
    """Each counts, in one call and in two, and merged into the weights it is the same model."""
    for name in linear_names(make_model(backbone, kind)):
        model, ids = make_model(backbone, kind, dtype=torch.float64), tokens(2, 20)
        before = model(input_ids=ids, use_cache=False).logits
        lora = adapted(model, [name]).double()
        whole = lora(input_ids=ids, use_cache=False).logits
        assert not torch.allclose(whole, before, atol=1e-6), f"an adapter on {name} does nothing"
        checks.close(in_two_calls(lora, ids), whole)
        checks.close(lora.merge_and_unload()(input_ids=ids, use_cache=False).logits, whole)


@every_kind
@torch.no_grad()
def test_offloaded_models(kind: str, tmp_path: Any) -> None:
    """Weights lie in host memory or in files, and come when a layer is called."""
    from accelerate import cpu_offload, disk_offload

    model, ids = make_model("llama", kind), tokens(2, 20)
    wanted = model(ids, use_cache=False).logits
    for offload in (cpu_offload, lambda model, **device: disk_offload(model, tmp_path, **device)):
        away = copy.deepcopy(model)
        offload(away, execution_device=torch.device("cpu"))
        assert {parameter.device.type for parameter in away.parameters()} == {"meta"}
        checks.close(away(ids, use_cache=False).logits, wanted)
        checks.close(in_two_calls(away, ids), wanted)


@every_kind
@torch.no_grad()
def test_dynamic_int8(kind: str) -> None:
    """torch rounds the activations of each call by their range, so two calls are never one call
    exactly: as near as transformers' own model of that size comes, within four times."""
    control: Any = transformers_llama()
    ids, off = tokens(1, 40), {}
    for name, model in (
        ("control", control),
        (
            "ours",
            make_model("llama", kind, top_k=100)
            if kind in ("mka", "fmka")
            else make_model("llama", kind),
        ),
    ):
        wanted = model(ids, use_cache=False).logits
        small = torch.ao.quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear})
        whole = small(ids, use_cache=False).logits
        scale = wanted.square().mean().sqrt()
        off[name] = [
            ((a - b).square().mean().sqrt() / scale).item()
            for a, b in ((whole, wanted), (in_two_calls(small, ids), whole))
        ]
    assert all(
        ours <= 4 * theirs for ours, theirs in zip(off["ours"], off["control"], strict=True)
    ), off


def transformers_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return shake(LlamaForCausalLM(LlamaConfig(**LLAMA)))
