"""What is converted is what its weights say: wrappers are taken off, and what adds to the weights
is refused."""

import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import GPT2LMHeadModel, LlamaForCausalLM, LlamaForSequenceClassification

import checks
from checks_models import BACKBONES, shake, tokens
from mka.models import convert, mechanisms
from mka.models.plain import check_plain

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
IDS = tokens(2, 20)
LORA: dict[str, Any] = {"r": 2, "init_lora_weights": False}
compiled: Any = partial(torch.compile, backend="eager")


def llama(**changes: Any) -> Any:
    config = deepcopy(BACKBONES["llama"])
    config.update(changes)
    return shake(LlamaForCausalLM(config))  # pyright: ignore[reportArgumentType]


def tied() -> Any:
    return llama(tie_word_embeddings=True)


def adapted(*targets: str) -> Any:
    return get_peft_model(llama(), LoraConfig(target_modules=[*targets], **LORA))


def gpt2() -> Any:
    return shake(GPT2LMHeadModel(BACKBONES["gpt2"]))  # pyright: ignore[reportArgumentType]


def ours() -> Any:
    return convert(llama(), "mka", local_window=40)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS, use_cache=False).logits


def with_layers_compiled() -> Any:
    model = llama()
    model.model.layers[0] = compiled(model.model.layers[0])
    model.model.layers[1].self_attn = compiled(model.model.layers[1].self_attn)
    return model


def with_output_hooks() -> Any:
    """transformers hooks its layers on to collect what is asked for."""
    model = llama()
    model(IDS, output_hidden_states=True)
    model.enable_input_require_grads()
    return model


def pruned_for_good() -> Any:
    model = llama()
    layer = model.model.layers[0].mlp.up_proj
    prune.l1_unstructured(layer, "weight", 0.4)
    prune.remove(layer, "weight")
    return model


TAKEN: dict[str, Callable[[], Any]] = {
    "as it is": llama,
    "compiled": lambda: compiled(llama()),
    "compiled GPT-2": lambda: compiled(gpt2()),
    "in DataParallel": lambda: nn.DataParallel(llama()),
    "compiled, in DataParallel": lambda: nn.DataParallel(compiled(llama())),
    "layers compiled": with_layers_compiled,
    "ours, compiled": lambda: compiled(ours()),
    "heads tied": tied,
    "watched": with_output_hooks,
    "pruned for good": pruned_for_good,
    "merged": lambda: adapted("q_proj", "up_proj").merge_and_unload(),
}


@pytest.mark.parametrize("name", TAKEN)
def test_what_is_plain_within_is_converted_whole(name: str) -> None:
    model = TAKEN[name]()
    within = model.module if isinstance(model, nn.DataParallel) else model
    converted = convert(model, "fmka", local_window=40)
    checks.close(logits(converted), logits(within))


def test_in_distributed_data_parallel(tmp_path: Any) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        model = llama()
        wrapped = nn.parallel.DistributedDataParallel(model)
        checks.close(logits(convert(wrapped, "gqa")), logits(model))
    finally:
        torch.distributed.destroy_process_group()


def changed(change: Callable[[Any], Any], make: Callable[[], Any] = llama) -> Callable[[], Any]:
    """What makes a model and then changes it."""

    def made() -> Any:
        model = make()
        change(model)
        return model

    return made


def mlp(model: Any) -> Any:
    return model.model.layers[1].mlp


def attention(model: Any) -> Any:
    found = mechanisms(model)
    return found[1] if found else model.model.layers[1].self_attn


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def doubled(layer: nn.Linear) -> nn.Linear:
    other = Doubled(layer.in_features, layer.out_features, bias=False)
    other.weight = layer.weight
    return other


def dynamically_quantized(model: Any) -> Any:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def spoil(layer: nn.Module) -> None:
    with torch.no_grad():
        layer.get_parameter("weight")[0, 0] = torch.nan


UP, Q = "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"
HOOKED = "computes more than its weights: a hook is called with it, by "
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "adapter in the MLP": (
        changed(
            lambda m: inject_adapter_in_model(LoraConfig(target_modules=["up_proj"], **LORA), m)
        ),
        "model.layers.0.mlp.up_proj is a peft.tuners.lora.layer.Linear, .*merge the adapter first",
    ),
    "adapter in GPT-2's attention": (
        changed(
            lambda m: inject_adapter_in_model(LoraConfig(target_modules=["c_attn"], **LORA), m),
            gpt2,
        ),
        "transformer.h.0.attn.c_attn is a peft.*merge the adapter first",
    ),
    "adapter on our router": (
        changed(
            lambda m: inject_adapter_in_model(
                LoraConfig(target_modules=["router.output"], **LORA), m
            ),
            ours,
        ),
        "attention.router.output is a peft.*merge the adapter first",
    ),
    "PEFT model": (
        lambda: adapted("up_proj"),
        (
            "model is a peft.peft_model.PeftModel; it must be a LlamaForCausalLM or "
            "MkaLlamaForCausalLM: merge the adapter"
        ),
    ),
    "pruned MLP": (
        changed(lambda m: prune.l1_unstructured(mlp(m).up_proj, "weight", 0.3)),
        f"{UP} {HOOKED}torch.nn.utils.prune; .*prune.remove",
    ),
    "pruned attention": (
        changed(lambda m: prune.l1_unstructured(attention(m).q_proj, "weight", 0.3)),
        f"{Q} {HOOKED}torch.nn.utils.prune; .*prune.remove",
    ),
    "pruned GPT-2 attention": (
        changed(
            lambda m: prune.l1_unstructured(m.transformer.h[0].attn.c_attn, "weight", 0.3), gpt2
        ),
        f"transformer.h.0.attn.c_attn {HOOKED}torch.nn.utils.prune",
    ),
    "weight norm": (
        changed(lambda m: parametrizations.weight_norm(mlp(m).up_proj)),
        f"{UP} is a torch.nn.utils.parametrize.ParametrizedLinear, .*remove_parametrizations",
    ),
    "weight norm in our attention": (
        changed(lambda m: parametrizations.weight_norm(attention(m).v_proj), ours),
        "self_attn.attention.v_proj is a torch.nn.utils.parametrize.ParametrizedLinear",
    ),
    "older weight norm": (
        changed(lambda m: nn.utils.weight_norm(attention(m).q_proj)),
        f"{Q} {HOOKED}torch.nn.utils.weight_norm; call torch.nn.utils.remove_weight_norm",
    ),
    "older spectral norm": (
        changed(lambda m: nn.utils.spectral_norm(mlp(m).up_proj)),
        f"{UP} {HOOKED}torch.nn.utils.spectral_norm; call torch.nn.utils.remove_spectral_norm",
    ),
    "quantized": (
        lambda: dynamically_quantized(llama()),
        "self_attn.q_proj is a torch.ao.nn.quantized.dynamic.*neither quantized nor replaced",
    ),
    "offloaded": (
        lambda: cpu_offload(llama()),
        "embed_tokens.weight is offloaded .its device is meta.",
    ),
    "without data": (
        changed(lambda m: attention(m).k_proj.to("meta")),
        "k_proj.weight is offloaded",
    ),
    "another layer": (
        changed(lambda m: setattr(attention(m), "q_proj", doubled(attention(m).q_proj))),
        f"{Q} is a ",
    ),
    "another activation": (
        changed(lambda m: setattr(mlp(m), "act_fn", nn.GELU())),
        "mlp.act_fn is a torch.nn",
    ),
    "hook": (
        changed(lambda m: attention(m).q_proj.register_forward_hook(lambda *x: 2 * x[2])),
        f"{Q} {HOOKED}",
    ),
    "hook before": (
        changed(lambda m: mlp(m).register_forward_pre_hook(lambda *x: (2 * x[1][0],))),
        f"mlp {HOOKED}",
    ),
    "forward": (
        changed(lambda m: setattr(attention(m).q_proj, "forward", lambda x: x)),
        "its forward is replaced",
    ),
    "NaN": (changed(lambda m: spoil(mlp(m).up_proj)), f"{UP}.weight holds NaN or infinity"),
    "NaN in the attention": (
        changed(lambda m: spoil(attention(m).o_proj)),
        "self_attn.o_proj.weight holds NaN",
    ),
    "fewer layers": (
        changed(lambda m: m.model.layers.pop(1)),
        "model has no model.layers.1, which its config.json",
    ),
    "more layers": (
        changed(lambda m: m.model.layers.append(deepcopy(m.model.layers[0]))),
        (
            r"model.layers.2.input_layernorm.weight is a weight of the model, not by its "
            r"configuration \(9 such\)"
        ),
    ),
    "a bias": (
        changed(lambda m: setattr(attention(m).q_proj, "bias", nn.Parameter(torch.ones(32)))),
        f"{Q}.bias is a weight of the model, not by its configuration",
    ),
    "a weight more": (
        changed(lambda m: setattr(attention(m), "sinks", nn.Parameter(torch.ones(4)))),
        "self_attn.sinks is a weight of the model, not by its configuration",
    ),
    "a weight less": (
        changed(lambda m: mlp(m).up_proj.register_parameter("weight", None)),
        f"{UP}.weight is no",
    ),
    "another size": (
        changed(lambda m: setattr(m.model, "embed_tokens", nn.Embedding(60, 32))),
        r"embed_tokens.weight is \(60, 32\); by the model's configuration it is \(50, 32\)",
    ),
    "two precisions": (
        changed(lambda m: m.bfloat16().model.norm.float()),
        "model.norm.weight is torch.float32 in a model of torch.bfloat16 and would be rounded",
    ),
    "tied no more": (
        changed(lambda m: setattr(m.lm_head, "weight", nn.Parameter(torch.ones(50, 32))), tied),
        "and the weight that it is tied to have different values",
    ),
    "for classes": (
        lambda: LlamaForSequenceClassification(BACKBONES["llama"]),  # pyright: ignore[reportArgumentType]
        "LlamaForSequenceClassification; it must be a LlamaForCausalLM",
    ),
    "the body alone": (lambda: llama().model, "LlamaModel; it must be a LlamaForCausalLM"),
    "no model": (lambda: nn.Linear(2, 2), "model is a Linear; give a causal language model"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_plain_is_refused_in_one_line(name: str) -> None:
    make, message = REFUSED[name]
    model = make()
    with pytest.raises(ValueError, match=message) as caught:
        convert(model, "gqa")
    assert "\n" not in str(caught.value)


SETTINGS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "an epsilon": (
        lambda m: setattr(m.model.norm, "variance_epsilon", 0.5),
        r"model.norm.variance_epsilon is 0.5",
    ),
    "a scale": (
        lambda m: setattr(m.model.layers[1].self_attn, "scaling", 0.1),
        r"self_attn.scaling is 0.1",
    ),
    "angles": (
        lambda m: m.model.rotary_emb.inv_freq.mul_(2),
        "inv_freq is not what the model's config says",
    ),
    "a bound": (
        lambda m: setattr(m.model.embed_tokens, "max_norm", 0.5),
        "embed_tokens.max_norm is 0.5",
    ),
    "the config": (
        lambda m: setattr(m.config, "rms_norm_eps", 0.5),
        r"variance_epsilon is .*; by the model's config it is",
    ),
}


@pytest.mark.parametrize("what", SETTINGS)
def test_settings_that_are_not_those_of_the_config_are_refused(what: str) -> None:
    change, message = SETTINGS[what]
    model = llama()
    change(model)
    with pytest.raises(ValueError, match=message):
        convert(model, "gqa")


def test_settings_that_change_no_logit_are_not_looked_at() -> None:
    model = llama()
    model.config.pad_token_id, model.config.attention_dropout = 3, 0.1
    model.train().eval()
    wanted = logits(model)
    assert torch.allclose(logits(convert(model.bfloat16().float(), "gqa")), wanted, atol=0.1)


def test_adapters_are_converted_once_they_are_merged() -> None:
    """The remedy that the message names gives the adapted model."""
    model = adapted("up_proj", "k_proj")
    assert isinstance(model, PeftModel)
    wanted = logits(model)
    assert not torch.allclose(wanted, logits(llama()), atol=1e-3)
    checks.close(logits(convert(model.merge_and_unload(), "mha")), wanted)


def test_the_check_draws_nothing_and_changes_nothing() -> None:
    """A seed gives the router and memories that it gives without the check."""
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    drawn = torch.random.get_rng_state()
    check_plain(model)
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_nothing_is_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(llama(), "fmka")
