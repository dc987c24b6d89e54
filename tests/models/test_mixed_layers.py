"""Families that mix sliding and full layers: the full get the mechanism, the sliding compute what they did."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GptOssConfig, PreTrainedConfig, Qwen2Config

import checks
from checks_models import BACKBONES, GEMMA, LLAMA, TOKEN_IDS, greedy_without_cache, positions_of, shake, tokens
from mka.attention.gqa import GroupedQueryAttention
from mka.attention.mka import MemoryKeyedAttention
from mka.limits import InputError
from mka.models import REVERSIBLE, convert, mechanisms, memory_cache, read_in_pieces, states
from mka.models.weights import PRETRAINED

LENGTH = 40
QWEN: dict[str, Any] = {
    "sliding_window": 7,
    "use_sliding_window": True,
    "layer_types": ["full_attention", "sliding_attention"],
}
GPT_OSS: dict[str, Any] = {"head_dim": 12, "sliding_window": 7, "num_local_experts": 3, "num_experts_per_tok": 2}
FAMILIES: dict[str, PreTrainedConfig] = {
    "gemma3": BACKBONES["gemma3"],
    "gpt_oss": GptOssConfig(**LLAMA, **TOKEN_IDS, **GPT_OSS),
    "qwen2": Qwen2Config(**LLAMA, **TOKEN_IDS, **QWEN),
}
families = pytest.mark.parametrize("family", FAMILIES)
EVERYTHING = {"chunk_size": 3, "top_k": LENGTH}


def pretrained(family: str, dtype: torch.dtype = torch.float32) -> Any:
    """transformers turns rotary embeddings in float32, whatever the dtype."""
    return shake(AutoModelForCausalLM.from_config(FAMILIES[family]).to(dtype))


@families
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gqa", {"local_window": None}),
        ("gqa", {"local_window": LENGTH, "sink_tokens": 0}),
        ("mka", {"local_window": LENGTH}),
        ("mka", {"local_window": 9} | EVERYTHING),
        ("fmka", {"local_window": None}),
    ],
)
@torch.no_grad()
def test_it_is_the_pretrained_model_where_nothing_is_left_out(kind: str, options: dict[str, Any], family: str) -> None:
    """On rows that are longer than the sliding window."""
    model, ids = pretrained(family), tokens(2, LENGTH)
    converted = convert(model, kind, **options)
    checks.close(converted(ids).logits, model(ids).logits)
    again = convert(converted, kind, **options)
    checks.close(again(ids).logits, model(ids).logits)


@families
@torch.no_grad()
def test_a_window_is_of_the_full_layers_alone(family: str) -> None:
    converted = convert(pretrained(family), "mka", local_window=9, chunk_size=3, top_k=2)
    kinds = [type(layer) for layer in mechanisms(converted)]
    wanted = [MemoryKeyedAttention, GroupedQueryAttention]
    assert kinds == (wanted if family == "qwen2" else wanted[::-1])
    windows = {type(layer): (layer.local_window, layer.sink_tokens) for layer in mechanisms(converted)}
    assert windows == {MemoryKeyedAttention: (9, 4), GroupedQueryAttention: (7, 0)}
    kept = convert(converted, "gqa")
    assert sorted(layer.local_window or 0 for layer in mechanisms(kept)) == [7, 9]


@families
@torch.no_grad()
def test_it_decodes_as_it_reads_and_padding_does_not_matter(family: str) -> None:
    dtype = torch.float32 if family == "gpt_oss" else torch.float64  # its experts multiply in float32 at most
    model = convert(pretrained(family, dtype), "mka", local_window=9, chunk_size=3, top_k=2)
    ids = tokens(2, LENGTH)
    whole = model(ids, use_cache=False).logits
    for piece in (1, 5, 16):
        cache = memory_cache(model)
        checks.close(read_in_pieces(model, ids, cache, piece), whole[:, -1])
    sliding = next(n for n, layer in enumerate(mechanisms(model)) if isinstance(layer, GroupedQueryAttention))
    layer = mechanisms(model)[sliding]
    held = [layer.state_nbytes(2, length, dtype, REVERSIBLE) for length in (LENGTH, 7 + REVERSIBLE, 1000)]
    assert states(cache)[sliding].nbytes == held[0] < held[1] == held[2]
    model.generation_config.eos_token_id = None
    made = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(made, greedy_without_cache(model, ids, 6))
    left = torch.cat([tokens(2, 3, seed=1), ids], dim=1)
    mask = torch.ones_like(left)
    mask[0, :3] = 0
    padded = model(left, attention_mask=mask, position_ids=positions_of(mask), use_cache=False).logits
    checks.close(padded[0, 3:], whole[0])


@torch.no_grad()
@pytest.mark.parametrize("family", ["gemma3", "gpt_oss"])
def test_it_is_the_same_after_saving(family: str, tmp_path: Any) -> None:
    model = convert(pretrained(family), "mka", local_window=9, chunk_size=3, top_k=2)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(tokens(1, LENGTH)).logits, model(tokens(1, LENGTH)).logits)


@families
def test_all_that_is_pretrained_learns(family: str) -> None:
    model = convert(pretrained(family), "mka", local_window=9, chunk_size=3, top_k=2)
    model(tokens(1, LENGTH)).logits.square().sum().backward()
    for layer in mechanisms(model):
        names = [name for name, _ in layer.named_parameters() if name.startswith(PRETRAINED)]
        assert len(names) == {"gemma3": 6, "qwen2": 7, "gpt_oss": 9}[family]
        for name in names:
            assert layer.get_parameter(name).grad.abs().sum() > 0, name  # pyright: ignore[reportOptionalMemberAccess]


@pytest.mark.parametrize("kind", ["gqa", "mka", "fmka"])
def test_a_learned_sink_logit_is_one_more_term_of_the_softmax(kind: str) -> None:
    """Against a key of its own with no value; and weights without it are not shown."""
    model = convert(pretrained("gpt_oss", torch.float64), kind, local_window=9)
    layer: Any = mechanisms(model)[0]
    ids = tokens(1, 6)
    x = torch.randn(1, 6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, k, v = layer.rotate(layer.queries(x), torch.arange(6)), layer.keys(x), layer.values(x)
    k, v = (each.repeat_interleave(2, dim=2) for each in (layer.rotate(k, torch.arange(6)), v))
    scores = torch.einsum("bthd,bshd->bhts", q, k) / 12**0.5
    scores = scores.masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
    extra = layer.sink_logits.view(1, 4, 1, 1).expand(1, 4, 6, 1)
    weights = torch.cat([scores, extra], dim=3).softmax(3)[..., :-1]
    wanted = layer.o_proj(torch.einsum("bhts,bshd->bthd", weights, v).flatten(2))
    checks.close(layer(x)[0], wanted)
    if kind != "mka":
        with pytest.raises(InputError, match=r"output_attentions is True; .* sink logits"):
            model(ids, output_attentions=True)


def test_memory_layers_are_chosen_among_the_full_ones() -> None:
    kinds = ["sliding_attention", "full_attention"] * 3
    config = Gemma3TextConfig(**LLAMA | TOKEN_IDS | GEMMA | {"num_hidden_layers": 6, "layer_types": kinds})
    model = shake(AutoModelForCausalLM.from_config(config))
    choices: list[tuple[Any, list[int]]] = [("all", [1, 3, 5]), (2, [3]), ([5, 1], [1, 5])]
    for chosen, layers in choices:
        made = convert(model, "mka", local_window=9, chunk_size=3, memory_layers=chosen)
        found = [number for number, layer in enumerate(mechanisms(made)) if isinstance(layer, MemoryKeyedAttention)]
        assert found == layers
        assert [layer.local_window for layer in mechanisms(made)] == [7, 9] * 3
    with pytest.raises(InputError, match=r"memory_layers is .2.; .* list of layers that are not sliding: 1, 3, 5"):
        convert(model, "mka", local_window=9, memory_layers=[2])
    with pytest.raises(InputError, match="every n-th layer by a number from 1 to 3"):
        convert(model, "mka", local_window=9, memory_layers=4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50.0; the mechanisms need None"),
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is True; the mechanisms need False"),
        ({"layer_types": ["sliding_attention"] * 2}, "layer_types has 2 sliding layers and no other"),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    config: Any = deepcopy(BACKBONES["gemma3"])
    model = AutoModelForCausalLM.from_config(type(config)(**config.to_dict() | changes))
    with pytest.raises(InputError, match=message):
        convert(model, "mka", local_window=9)
