"""A folder that is not the model that was saved: what is missing, left over, rounded or no number
is one line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION

import checks
from checks_models import BACKBONES, LLAMA, TOKEN_IDS, make_model, shake, tokens
from mka.errors import InputError
from mka.models.loading import load_model
from mka.models.weights import stored_dtypes

Loader = Callable[[Path], Any]
IDS = tokens(1, 12)


def by_command(folder: Path) -> Any:
    return load_model(str(folder))


every_loader = pytest.mark.parametrize(
    "load", [AutoModelForCausalLM.from_pretrained, by_command], ids=["auto", "ours"]
)


def saved(folder: Path, model: Any | None = None) -> Path:
    (make_model("llama", "mka") if model is None else model).save_pretrained(folder)
    return folder


def plain_llama(**changes: Any) -> Any:
    return shake(LlamaForCausalLM(LlamaConfig(**LLAMA | TOKEN_IDS | changes)))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path = folder / "model.safetensors"
    weights = {name: value.clone() for name, value in load_file(path).items()}
    path.unlink()  # the loaded tensors were mapped from it
    save_file(change(weights), path, {"format": "pt"})


def changed_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(load: Loader, folder: Path) -> str:
    with pytest.raises(InputError) as caught:
        load(folder)
    line = str(caught.value)
    assert "\n" not in line
    return line


def without(*parts: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda weights: {
        name: value for name, value in weights.items() if not any(part in name for part in parts)
    }


MISSING = {
    "mlp": ("model.layers.0.mlp.gate_proj.weight", 6, False),
    "q_proj": ("model.layers.0.self_attn.attention.q_proj.weight", 2, False),
    "1.input_layernorm": ("model.layers.1.input_layernorm.weight", 1, False),
    "decay_logit": ("model.layers.0.self_attn.attention.session.decay_logit", 2, True),
    "router": ("model.layers.0.self_attn.attention.router.gate", 10, True),
    "lm_head": ("lm_head.weight", 1, False),
}


@every_loader
@pytest.mark.parametrize("lost", MISSING)
def test_a_missing_weight_is_named_and_counted(lost: str, load: Loader, tmp_path: Path) -> None:
    name, count, new = MISSING[lost]
    rewrite(saved(tmp_path), without(lost))
    line = refused(load, tmp_path)
    assert line.startswith(f"{name} is missing from the weights of {str(tmp_path)!r}")
    assert (f" ({count} are missing)" in line) == (count > 1)
    assert ("mka.models.convert" in line) == new


@every_loader
def test_a_configuration_with_more_or_fewer_layers_than_the_weights(
    load: Loader, tmp_path: Path
) -> None:
    saved(tmp_path)
    changed_config(tmp_path, num_hidden_layers=3)
    assert refused(load, tmp_path).startswith(
        "model.layers.2.self_attn.attention.q_proj.weight is missing from"
    )
    changed_config(tmp_path, num_hidden_layers=1)
    line = refused(load, tmp_path)
    assert line.startswith("model.layers.1.input_layernorm.weight is among the weights of")
    assert line.endswith("; its config.json describes another model")


@every_loader
def test_weights_under_the_names_of_a_compiled_model(load: Loader, tmp_path: Path) -> None:
    rewrite(
        saved(tmp_path),
        lambda weights: {f"_orig_mod.{name}": value for name, value in weights.items()},
    )
    line = refused(load, tmp_path)
    assert line.startswith("model.embed_tokens.weight is missing from")
    assert "; they hold _orig_mod.lm_head.weight, which the model does not have (" in line


@every_loader
def test_a_pretrained_attention_is_to_be_converted(load: Loader, tmp_path: Path) -> None:
    """A pretrained folder whose config.json says that it is one of ours."""
    config = saved(tmp_path / "ours") / "config.json"
    folder = saved(tmp_path / "theirs", plain_llama())
    (folder / "config.json").write_bytes(config.read_bytes())
    line = refused(load, folder)
    assert line.startswith("model.layers.0.self_attn.attention.q_proj.weight is missing from")
    assert line.endswith("load it as it is and call mka.models.convert")


def test_a_model_that_is_not_ours_is_held_to_the_same(tmp_path: Path) -> None:
    folder = saved(tmp_path, plain_llama())
    changed_config(folder, num_hidden_layers=1)
    assert refused(by_command, folder).startswith(
        "model.layers.1.input_layernorm.weight is among the weights of"
    )
    changed_config(folder, num_hidden_layers=3)
    assert refused(by_command, folder).startswith(
        "model.layers.2.self_attn.q_proj.weight is missing from"
    )
    changed_config(folder, num_hidden_layers=2, intermediate_size=40)
    assert "mlp.down_proj.weight is (32, 48) in the folder and (32, 40) in the model" in refused(
        by_command, folder
    )


@pytest.mark.parametrize("backbone", BACKBONES)
def test_what_was_saved_whole_is_loaded(
    backbone: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ours and transformers', tied heads among them, without a word."""
    theirs = shake(AutoModelForCausalLM.from_config(BACKBONES[backbone]))
    for name, model in (("ours", make_model(backbone, "fmka")), ("theirs", theirs)):
        loaded = load_model(str(saved(tmp_path / name, model)))
        checks.close(loaded(IDS).logits, model(IDS).logits)
    assert capsys.readouterr().err == ""


def test_constants_in_older_files_are_no_weights(tmp_path: Path) -> None:
    """As GPT-2's files once were: without the prefix, with causal masks."""
    theirs = shake(AutoModelForCausalLM.from_config(BACKBONES["gpt2"]))
    saved(tmp_path, theirs)
    masks = {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "h.1.attn.masked_bias": torch.tensor(-1e4)}
    rewrite(
        tmp_path,
        lambda all_: (
            {name.removeprefix("transformer."): value for name, value in all_.items()} | masks
        ),
    )
    checks.close(load_model(str(tmp_path))(IDS).logits, theirs(IDS).logits)


def test_a_head_saved_under_its_own_name_though_tied(tmp_path: Path) -> None:
    tied = shake(plain_llama(tie_word_embeddings=True))
    saved(tmp_path, tied)
    rewrite(
        tmp_path, lambda all_: all_ | {"lm_head.weight": all_["model.embed_tokens.weight"].clone()}
    )
    checks.close(load_model(str(tmp_path))(IDS).logits, tied(IDS).logits)
    rewrite(tmp_path, without("lm_head"))
    checks.close(load_model(str(tmp_path))(IDS).logits, tied(IDS).logits)
    rewrite(tmp_path, without("embed_tokens"))
    assert "embed_tokens.weight is missing" in refused(by_command, tmp_path)


def test_the_report_is_transformers_own_for_who_asks(tmp_path: Path) -> None:
    saved(tmp_path)
    reported: Any = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    model, info = reported
    assert (info["missing_keys"], info["unexpected_keys"]) == (set(), set())
    changed_config(tmp_path, intermediate_size=40)
    drawn = AutoModelForCausalLM.from_pretrained(tmp_path, ignore_mismatched_sizes=True)
    assert drawn.model.layers[0].mlp.up_proj.weight.shape == (40, 32)
    assert torch.equal(drawn.model.norm.weight, model.model.norm.weight)


@pytest.mark.skipif(
    Version(peft.__version__) < Version(MIN_PEFT_VERSION), reason="transformers wants a newer peft"
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_an_adapter_beside_the_weights(tmp_path: Path) -> None:
    """It is loaded on top of weights that are all there; the commands want it merged."""
    model = make_model("llama", "mka")
    saved(tmp_path, model)
    model.add_adapter(peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    for path in (tmp_path / "adapter").glob("adapter_*"):
        path.rename(tmp_path / path.name)
    checks.close(AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits, model(IDS).logits)
    line = f"model is {str(tmp_path)!r}; it holds an adapter; save it merged"
    assert refused(by_command, tmp_path).startswith(line)
    rewrite(tmp_path, without("mlp"))
    assert "gate_proj.weight is missing" in refused(AutoModelForCausalLM.from_pretrained, tmp_path)


PRECISIONS = [
    ("float32", "bfloat16", True),
    ("float32", "float16", True),
    ("bfloat16", "float16", True),
    ("float16", "bfloat16", True),
    ("float64", "float32", True),
    ("bfloat16", "float32", False),
    ("float16", "float16", False),
    ("float32", None, False),
]


@pytest.mark.parametrize(("stored", "configured", "lost"), PRECISIONS)
def test_weights_that_the_configuration_rounds_are_said(
    stored: str,
    configured: str | None,
    lost: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    saved(tmp_path, make_model("llama", "mka", dtype=getattr(torch, stored)))
    changed_config(tmp_path, dtype=configured)
    capsys.readouterr()  # what saving says is not asked
    used = load_model(str(tmp_path)).dtype
    assert used == getattr(torch, configured or stored)
    said = capsys.readouterr().err
    assert said.count("\n") == lost
    if lost:
        assert f"is stored in {stored} and was rounded to the {configured} of config.json (" in said
        assert said.endswith(f"to read all of it, set dtype there to {stored}\n")


def test_one_weight_of_another_precision_among_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And in several files."""
    model = plain_llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len([*tmp_path.glob("model-*.safetensors")]) > 1
    load_model(str(tmp_path))
    assert capsys.readouterr().err == ""
    files = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    path = tmp_path / files["model.norm.weight"]
    weights = {name: value.clone() for name, value in load_file(path).items()}
    path.unlink()
    save_file(
        weights | {"model.norm.weight": weights["model.norm.weight"].float()},
        path,
        {"format": "pt"},
    )
    assert set(stored_dtypes(tmp_path).values()) == {"BF16", "F32"}
    load_model(str(tmp_path))
    said = capsys.readouterr().err
    assert said.startswith("mka: model.norm.weight of ")
    assert "is stored in float32 and was rounded to the bfloat16 of config.json; to read" in said


@pytest.mark.parametrize(
    ("altered", "said"),
    [
        ("I32", "is stored as I32; allowed: F64, F32, F16, BF16"),
        ("F16", "it cannot be loaded: "),
        ("F31", "cannot be"),
    ],
)
def test_a_dtype_altered_in_the_header_is_an_error(altered: str, said: str, tmp_path: Path) -> None:
    path = saved(tmp_path) / "model.safetensors"
    raw = path.read_bytes()
    path.unlink()
    path.write_bytes(raw.replace(b'"F32"', b'"%s"' % altered.encode(), 1))
    assert said in refused(by_command, tmp_path)


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kind", ["mka", "theirs"])
def test_a_weight_that_is_no_number_is_named(spoilt: float, kind: str, tmp_path: Path) -> None:
    model = plain_llama() if kind == "theirs" else make_model("llama", kind)
    name = (
        "self_attn.attention.router.gate" if kind == "mka" else "mlp.up_proj.weight"
    )  # a buffer is saved, too
    with torch.no_grad():
        model.state_dict()[f"model.layers.1.{name}"].view(-1)[-1] = spoilt
    saved(tmp_path, model)
    assert (
        refused(by_command, tmp_path)
        == f"model.layers.1.{name} of {str(tmp_path)!r} holds NaN or infinity"
    )


@torch.no_grad()
def test_finite_weights_that_give_logits_that_are_no_numbers(tmp_path: Path) -> None:
    model = plain_llama()
    model.lm_head.weight[7:] = 3e38 * model.lm_head.weight[7:].sign()
    loaded = load_model(str(saved(tmp_path, model)))
    with pytest.raises(InputError, match="its weights are finite and its logits are not"):
        loaded(IDS)


@torch.no_grad()
def test_a_token_may_be_ruled_out_but_not_all_of_them(tmp_path: Path) -> None:
    loaded = load_model(str(saved(tmp_path, plain_llama())))
    loaded.lm_head.register_forward_hook(
        lambda _module, _inputs, y: y.index_fill(-1, torch.tensor([3]), -torch.inf)
    )
    assert loaded(IDS).logits[..., 3].eq(-torch.inf).all()
    loaded.lm_head.register_forward_hook(lambda _module, _inputs, y: torch.full_like(y, -torch.inf))
    with pytest.raises(InputError, match="its logits are not"):
        loaded(IDS)
