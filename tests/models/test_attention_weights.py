"""output_attentions: the weights that were used, over the columns that were seen."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, LlamaForCausalLM

import checks
from checks_models import BACKBONES, TWO_BACKBONES, make_model, positions_of, shake, tokens
from checks_state import SIDES, TOKENS, padding
from mka.attention import ATTENTION_TYPES
from mka.models import convert, mechanisms

HAVING = [kind for kind in ATTENTION_TYPES if kind != "mka"]
ORIGINALS: dict[str, Any] = {"gpt2": GPT2LMHeadModel, "llama": LlamaForCausalLM}
having = pytest.mark.parametrize("kind", HAVING)
two_backbones = pytest.mark.parametrize("backbone", TWO_BACKBONES)
sides = pytest.mark.parametrize("side", SIDES)


def masked(side: str, ids: Tensor) -> tuple[dict[str, Any], Tensor]:
    mask = padding(side, ids.shape[0])
    if mask is None:
        return {}, torch.ones_like(ids, dtype=torch.bool)
    return {"attention_mask": mask, "position_ids": positions_of(mask)}, mask


@having
@two_backbones
@sides
@torch.no_grad()
def test_values_weighted_so_give_what_the_block_gave(kind: str, backbone: str, side: str) -> None:
    """The weights, times the values seen on their way, are the heads that reach the output
    projection."""
    model, ids = make_model(backbone, kind, dtype=torch.float64), tokens(3, TOKENS)
    more, kept = masked(side, ids)
    seen: list[Tensor] = []
    last: Any = mechanisms(model)[-1]
    values = last.v_up_proj if kind == "mla" else last.v_proj
    hooks = [
        values.register_forward_hook(lambda module, given, v: seen.append(v)),
        last.o_proj.register_forward_pre_hook(lambda module, given: seen.append(given[0])),
    ]
    output = model(ids, output_attentions=True, use_cache=False, **more)
    for hook in hooks:
        hook.remove()
    v, o = (
        x.unflatten(-1, (-1, last.head_dim)) for x in seen
    )  # valid tokens first, as mechanisms see them
    v = v.repeat_interleave(last.num_heads // v.shape[2], dim=2)
    assert len(output.attentions) == len(mechanisms(model))
    for row in range(3):
        weights = output.attentions[-1][row][:, kept[row]][..., kept[row]]
        count = weights.shape[-1]
        checks.close(torch.einsum("hts,shd->thd", weights, v[row, :count]), o[row, :count])
    assert not output.attentions[-1].transpose(1, 3)[~kept].any(), "padding was attended to"
    assert torch.equal(output.logits, model(ids, use_cache=False, **more).logits)


@having
@two_backbones
@sides
@torch.no_grad()
def test_weights_of_calls_are_rows_of_those_of_one_call(
    kind: str, backbone: str, side: str
) -> None:
    model, ids = make_model(backbone, kind, dtype=torch.float64), tokens(3, TOKENS)
    more, kept = masked(side, ids)
    whole = model(ids, output_attentions=True, use_cache=False, **more).attentions
    cache, start = None, 0
    for stop in (9, 10, 11, 29, TOKENS):
        part = {"attention_mask": more["attention_mask"][:, :stop]} if more else {}
        if more:
            part["position_ids"] = more["position_ids"][:, start:stop]
        output = model(ids[:, start:stop], past_key_values=cache, output_attentions=True, **part)
        for weights, all_weights in zip(output.attentions, whole, strict=True):
            rows = kept[:, start:stop]
            checks.close(
                weights.transpose(1, 2)[rows],
                all_weights[:, :, start:stop, :stop].transpose(1, 2)[rows],
            )
        cache, start = output.past_key_values, stop


@two_backbones
@torch.no_grad()
def test_they_are_those_of_transformers(backbone: str) -> None:
    config = BACKBONES[backbone]
    original = shake(ORIGINALS[backbone]._from_config(config, attn_implementation="eager"), 0.1)
    ids = tokens(2, TOKENS)
    expected = original(ids, output_attentions=True).attentions
    shown = convert(original, "mha" if backbone == "gpt2" else "gqa")(
        ids, output_attentions=True
    ).attentions
    for ours, theirs in zip(shown, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@having
def test_generate_returns_them_for_every_token(kind: str) -> None:
    model, ids = make_model("llama", kind), tokens(2, 7)
    options: dict[str, Any] = {
        "do_sample": False,
        "max_new_tokens": 4,
        "return_dict_in_generate": True,
    }
    output = model.generate(ids, output_attentions=True, **options)
    assert [tuple(step[0].shape) for step in output.attentions] == [
        (2, 4, 7, 7),
        *((2, 4, 1, 7 + i) for i in (1, 2, 3)),
    ]
    for step in output.attentions:
        checks.close(step[-1].sum(-1), torch.ones(step[-1].shape[:-1]))


def test_a_tuple_where_one_is_asked_for() -> None:
    model, ids = make_model("gpt2", "gqa"), tokens(1, 5)
    logits, attentions = model(ids, output_attentions=True, use_cache=False, return_dict=False)
    assert logits.shape[:2] == (1, 5)
    assert [w.shape for w in attentions] == [(1, 4, 5, 5)] * 2


def test_mka_says_that_it_has_none() -> None:
    model, ids = make_model("gpt2", "mka"), tokens(1, 5)
    with pytest.raises(
        ValueError, match="output_attentions is True; mka has no such weights: it mixes three"
    ):
        model(ids, output_attentions=True)
    assert model(ids, output_hidden_states=True).hidden_states is not None


def test_they_have_gradients() -> None:
    model, ids = make_model("gpt2", "fmka"), tokens(1, 5)
    model(ids, output_attentions=True, use_cache=False).attentions[0][..., 0].sum().backward()
    first: Any = mechanisms(model)[0]
    assert first.q_proj.weight.grad.any()


def test_a_compiled_model_gives_them_too() -> None:
    model, ids = make_model("gpt2", "gqa"), tokens(1, 5)
    expected = model(ids, output_attentions=True, use_cache=False).attentions
    compiled = torch.compile(model, backend="eager")
    for weights, again in zip(
        expected, compiled(ids, output_attentions=True, use_cache=False).attentions, strict=True
    ):
        checks.close(again, weights)
