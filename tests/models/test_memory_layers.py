"""A memory in some layers only, the others windowed with sinks; and folders from before these
options existed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import checks
from checks_models import BACKBONES, OPTIONS, greedy_without_cache, make_model, shake, tokens
from mka.attention.gqa import GroupedQueryAttention
from mka.attention.mka import MemoryKeyedAttention
from mka.errors import InputError
from mka.memory.bank import Bank
from mka.memory.options import LongTermConfig
from mka.models import (
    build_model,
    convert,
    fingerprint,
    mechanisms,
    memory_cache,
    read_in_pieces,
    states,
)

MEMORIES = ("mka", "fmka")


@pytest.mark.parametrize(
    ("chosen", "layers"), [("all", [0, 1]), (1, [0, 1]), (2, [1]), ([0], [0]), ((1, 0, 1), [0, 1])]
)
@pytest.mark.parametrize("kind", MEMORIES)
def test_which_layers(chosen: Any, layers: list[int], kind: str) -> None:
    found = [
        type(attn).__name__ for attn in mechanisms(make_model("llama", kind, memory_layers=chosen))
    ]
    other = "GroupedQueryAttention"
    assert [number for number, name in enumerate(found) if name != other] == layers
    for attn in mechanisms(make_model("llama", kind, memory_layers=chosen)):
        assert (attn.local_window, attn.sink_tokens, attn.num_kv_heads) == (6, 4, 2)


@pytest.mark.parametrize(
    ("kind", "options", "chosen", "message"),
    [
        ("mka", {}, 3, "every n-th layer by a number from 1 to 2"),
        ("mka", {}, 0, "memory_layers is 0"),
        ("mka", {}, [], r"memory_layers is \[\]"),
        ("mka", {}, [2], "a list of layers from 0 to 1"),
        ("mka", {}, [-1], r"memory_layers is \[-1\]"),
        ("mka", {}, "some", "memory_layers is 'some'"),
        ("mka", {}, True, "memory_layers is True"),
        (
            "fmka",
            {"local_window": None},
            2,
            "this fmka has no memory that other layers could do without",
        ),
        ("gqa", {}, 2, "this gqa has no memory"),
    ],
)
def test_what_is_refused(kind: str, options: dict[str, Any], chosen: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_model("llama", kind, memory_layers=chosen, **options)


@pytest.mark.parametrize("kind", MEMORIES)
@pytest.mark.parametrize("backbone", ["gpt2", "llama"])
@torch.no_grad()
def test_it_decodes_and_is_the_same_after_saving(kind: str, backbone: str, tmp_path: Path) -> None:
    model = make_model(backbone, kind, memory_layers=[1])
    model.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    prompt = tokens(1, 40)
    assert torch.equal(again(prompt).logits, model(prompt).logits)
    again.generation_config.eos_token_id = None
    generated = again.generate(prompt, max_new_tokens=5, do_sample=False)
    assert torch.equal(generated, greedy_without_cache(model, prompt, 5))


@pytest.mark.parametrize("kind", MEMORIES)
@torch.no_grad()
def test_caches_of_the_other_layers_stay_bounded(kind: str) -> None:
    model = make_model("llama", kind, memory_layers=[1])
    sizes = []
    for length in (80, 120):
        cache = memory_cache(model)
        read_in_pieces(model, tokens(1, length), cache, piece=40)
        sizes.append([state.nbytes for state in states(cache)])
    assert sizes[0][0] == sizes[1][0]
    assert sizes[0][1] < sizes[1][1]


@pytest.mark.parametrize("kind", MEMORIES)
@pytest.mark.parametrize("store", ["host", "disk"])
@torch.no_grad()
def test_stores_and_banks_are_of_the_layers_that_remember(
    kind: str, store: Any, tmp_path: Path
) -> None:
    model, ids = make_model("llama", kind, dtype=torch.float64, memory_layers=[1]), tokens(1, 50)
    config = LongTermConfig(longterm_store=store)
    cache = memory_cache(model, config)
    read_in_pieces(model, ids[:, :20], cache, piece=7)
    parts = model(ids[:, 20:], past_key_values=cache).logits
    checks.close(parts, model(ids).logits[:, 20:])
    bank = Bank.create(tmp_path / "bank", fingerprint(model))
    with bank.writing():
        reading = memory_cache(model, LongTermConfig(longterm_store="disk"))
        read_in_pieces(model, tokens(1, 30, seed=3), reading)
        bank.add("book", "text", 30, states(reading))
    remembering = memory_cache(model, config, bank)
    said = model(ids, past_key_values=remembering).logits
    assert not torch.allclose(said, model(ids).logits)
    assert [state.banked for state in states(remembering)] == [0, 10]


def test_a_pretrained_model_can_be_given_some() -> None:
    model = make_model("llama", "gqa", local_window=None)
    converted = convert(model, "mka", local_window=8, chunk_size=3, memory_layers=2)
    assert [type(attn) for attn in mechanisms(converted)] == [
        GroupedQueryAttention,
        MemoryKeyedAttention,
    ]
    ids = tokens(1, 8)
    with torch.no_grad():
        checks.close(converted(ids).logits, model(ids).logits)


@pytest.mark.parametrize("kind", ["mka", "fmka", "gqa"])
@torch.no_grad()
def test_a_folder_without_the_newer_options_is_as_it_was(kind: str, tmp_path: Path) -> None:
    """Routed, no sinks, keys at the window's edge."""
    old: dict[str, Any] = {"sink_tokens": 0, "max_distance": None}
    if kind == "mka":
        old |= {"mix": "routed", "longterm_positions": "clamped"}
    model = shake(build_model(BACKBONES["llama"], kind, **OPTIONS[kind] | old))
    model.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for name in old:
        del config["attention_options"][name]
    path.write_text(json.dumps(config))
    again, ids = AutoModelForCausalLM.from_pretrained(tmp_path).eval(), tokens(1, 60)
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.config.attention_options | old == again.config.attention_options
    fresh = shake(build_model(BACKBONES["llama"], kind, **OPTIONS[kind]))
    assert fresh.config.attention_options | old != fresh.config.attention_options
