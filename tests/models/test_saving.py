"""A saved folder is an ordinary one: AutoConfig, AutoModelForCausalLM, safetensors, nothing
executed."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

import checks
from checks_models import BACKBONES, OPTIONS, make_model, shake, tokens
from mka.attention import ATTENTION_TYPES
from mka.models import build_model, convert

IDS = tokens(1, 30)


def changed_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("kind", ATTENTION_TYPES)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_folder_gives_the_same_model(kind: str, backbone: str, tmp_path: Path) -> None:
    model = make_model(backbone, kind)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(loaded) is type(model)
    checks.close(loaded(IDS).logits, model(IDS).logits)
    config: Any = AutoConfig.from_pretrained(tmp_path)
    assert config.attention_type == kind
    assert config.attention_options.items() >= OPTIONS[kind].items()
    assert {path.suffix for path in tmp_path.iterdir()} == {".safetensors", ".json"}


def test_a_converted_model_keeps_its_learned_gate(tmp_path: Path) -> None:
    model = convert(
        shake(AutoModelForCausalLM.from_config(BACKBONES["llama"])), "mka", local_window=6
    )
    for name, parameter in model.named_parameters():
        if name.endswith("router.gate"):
            torch.nn.init.constant_(parameter, 0.5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    gates = {
        name: p.item() for name, p in loaded.named_parameters() if name.endswith("router.gate")
    }
    assert list(gates.values()) == [0.5, 0.5]
    checks.close(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(("ours", "other"), [("q_norm", "q_proj.norm"), ("q_proj.norm", "q_norm")])
def test_norms_of_heads_load_under_both_names(ours: str, other: str, tmp_path: Path) -> None:
    """Once they stood inside the projections, and a folder may name them so."""
    model = make_model("qwen3", "mka")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    pairs = [(ours, other), (ours.replace("q_", "k_"), other.replace("q_", "k_"))]
    for before, after in pairs:
        weights = {
            name.replace(f".{before}.", f".{after}."): weight for name, weight in weights.items()
        }
    path.unlink()
    save_file(weights, path, {"format": "pt"})
    checks.close(
        AutoModelForCausalLM.from_pretrained(tmp_path).eval()(IDS).logits, model(IDS).logits
    )


def test_another_process_needs_one_import(tmp_path: Path) -> None:
    model = make_model("gpt2", "fmka")
    model.save_pretrained(tmp_path)
    script = (
        "import sys, torch, mka.models; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()\n"
        "print(model(torch.arange(1, 20)[None]).logits.double().sum().item())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert float(done.stdout) == pytest.approx(
        model(torch.arange(1, 20)[None]).logits.double().sum().item(), abs=1e-6
    )


def test_an_unknown_option_is_named(tmp_path: Path) -> None:
    make_model("gpt2", "mka").save_pretrained(tmp_path)
    changed_config(tmp_path, attention_options={"chunk_sise": 4})
    with pytest.raises(
        ValueError, match=r"mka has no option 'chunk_sise'; allowed: .*nearest: 'chunk_size'"
    ):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    changed_config(tmp_path, attention_type="mkb")
    with pytest.raises(ValueError, match="unknown attention type 'mkb'"):
        AutoConfig.from_pretrained(tmp_path)


def test_a_shape_that_does_not_fit_is_named(tmp_path: Path) -> None:
    make_model("gpt2", "gqa", num_kv_heads=2).save_pretrained(tmp_path)
    changed_config(tmp_path, attention_options={"num_kv_heads": 1})
    message = (
        r"h\.0\.attn\.attention\.k_proj\.bias is \(16,\) in the folder and \(8,\) in the model"
    )
    with pytest.raises(ValueError, match=message) as caught:
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


def test_the_same_seed_gives_the_same_model_and_mechanisms_share_what_is_not_theirs() -> None:
    for config in (BACKBONES["gpt2"], BACKBONES["llama"]):
        first, again = (build_model(config, "fmka", seed=3).state_dict() for _ in range(2))
        other = build_model(config, "mha", seed=3).state_dict()
        assert all(torch.equal(value, again[name]) for name, value in first.items())
        shared = [name for name in first if ".attention." not in name]
        assert all(torch.equal(first[name], other[name]) for name in shared)
        checks.close(first[shared[0]], other[shared[0]])
