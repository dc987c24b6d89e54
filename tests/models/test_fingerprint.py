"""Everything that decides what a model makes of a text is in its fingerprint, and nothing that does
not."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from checks_models import BACKBONES, LLAMA3_ROPE, make_model
from mka.models import fingerprint
from mka.models.reading import IRRELEVANT, deciding

every_backbone = pytest.mark.parametrize("backbone", BACKBONES)


def other(value: Any) -> Any:
    """Another value of the same kind."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float)):
        return value * 2 + 1
    if isinstance(value, dict):
        return {**value, "one more": 1} if value else {"one": 1}
    return [*value, value[-1]] if isinstance(value, list) else f"{value}-other"


@every_backbone
def test_every_field_counts_but_those_that_are_named(backbone: str) -> None:
    """By their list in the configuration itself: one that a later release adds is among them."""
    config = make_model(backbone, "mka").config
    values, before = config.to_dict(), deciding(config)

    class Changed:
        def __init__(self, **changes: Any) -> None:
            self.values = values | changes

        def to_dict(self) -> dict[str, Any]:
            return deepcopy(self.values)

    counted = {
        name
        for name, value in values.items()
        if deciding(Changed(**{name: other(value)})) != before
    }
    assert values.keys() - counted == values.keys() & IRRELEVANT
    activation = "hidden_activation" if backbone == "gemma3" else "hidden_act"
    assert {"rope_parameters", "rms_norm_eps", activation} <= counted or backbone == "gpt2"
    assert deciding(Changed(a_field_of_a_later_release=0.5)) != before
    assert deciding(Changed(a_field_of_a_later_release=None)) == before


CHANGES: dict[str, Any] = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "rms_norm_eps": 0.1,
    "hidden_act": "gelu",
    "max_position_embeddings": 256,
}


@pytest.mark.parametrize("field", [*CHANGES, "rope scaling", "learned_gate", "attention_options"])
def test_the_same_weights_with_other_settings_are_another_model(field: str, tmp_path: Path) -> None:
    model = make_model("llama", "mka")
    model.save_pretrained(tmp_path)
    options = model.config.attention_options | {"longterm_positions": "none"}
    changes = CHANGES | {"attention_options": options, "learned_gate": True}
    changed = (
        {"rope_parameters": LLAMA3_ROPE} if field == "rope scaling" else {field: changes[field]}
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    assert fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path)) != fingerprint(model)


@every_backbone
@pytest.mark.parametrize("kind", ["mka", "fmka"])
def test_it_is_the_same_after_saving_and_whatever_is_set_for_generation(
    backbone: str, kind: str, tmp_path: Path
) -> None:
    model = make_model(backbone, kind)
    before = fingerprint(model)
    for turn in ("one", "two"):
        model.save_pretrained(tmp_path / turn)
        assert fingerprint(model) == before
        model = AutoModelForCausalLM.from_pretrained(tmp_path / turn)
        assert fingerprint(model) == before
    model.config.update({"use_cache": False, "eos_token_id": [0, 3], "output_hidden_states": True})
    assert fingerprint(model.train()) == before


def test_an_option_that_is_the_default_is_the_same_as_none_given() -> None:
    given, left = make_model("llama", "mka", router_size=None), make_model("llama", "mka")
    assert given.config.attention_options != left.config.attention_options
    assert fingerprint(given) == fingerprint(left)


def test_every_weight_and_its_precision_counts() -> None:
    model = make_model("llama", "mka")
    found = {fingerprint(model), fingerprint(deepcopy(model).to(torch.bfloat16))}
    for name in ("lm_head.weight", "model.layers.1.self_attn.attention.session.decay_logit"):
        changed = deepcopy(model)
        with torch.no_grad():
            changed.get_parameter(name).view(-1)[0] += 1
        found.add(fingerprint(changed))
    assert len(found) == 4
