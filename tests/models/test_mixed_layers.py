"""Families that mix sliding and full layers: the full get the mechanism, the sliding compute what
they did."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

import checks
from checks_models import (
    BACKBONES,
    GEMMA,
    LLAMA,
    TOKEN_IDS,
    greedy_without_cache,
    positions_of,
    shake,
    tokens,
)
from mka.attention.gqa import GroupedQueryAttention
from mka.attention.mka import MemoryKeyedAttention
from mka.errors import InputError
from mka.models import REVERSIBLE, build_model, convert, mechanisms, memory_cache, states
from mka.models.weights import PRETRAINED

LENGTH = 40
QWEN: dict[str, Any] = {
    "sliding_window": 7,
    "use_sliding_window": True,
    "layer_types": ["full_attention", "sliding_attention"],
}
GPT_OSS: dict[str, Any] = {
    "head_dim": 12,
    "sliding_window": 7,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
}
FAMILIES: dict[str, PreTrainedConfig] = {
    "gemma3": BACKBONES["gemma3"],
    "gpt_oss": GptOssConfig(**LLAMA, **TOKEN_IDS, **GPT_OSS),
    "qwen2": Qwen2Config(**LLAMA, **TOKEN_IDS, **QWEN),
    "qwen3": Qwen3Config(**LLAMA | {"head_dim": 12}, **TOKEN_IDS, **QWEN),
}
families = pytest.mark.parametrize("family", FAMILIES)
EVERYTHING = {"chunk_size": 3, "top_k": LENGTH}


def of_config(config: PreTrainedConfig, dtype: torch.dtype = torch.float64) -> Any:
    return shake(AutoModelForCausalLM.from_config(config).to(dtype))


def pretrained(family: str, dtype: torch.dtype = torch.float64) -> Any:
    return of_config(FAMILIES[family], dtype)


class Norm(nn.Module):
    """x (..., C) / rms(x), times a weight that some families keep less 1."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.eps = (
            norm.weight,
            norm.variance_epsilon if hasattr(norm, "variance_epsilon") else norm.eps,
        )
        self.offset = float("Gemma" in type(norm).__name__)

    def forward(self, x: Tensor) -> Tensor:
        return (
            x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * (self.offset + self.weight)
        )


class Angles(nn.Module):
    """Cosines and sines of a kind of layer, from its rates (D / 2,)."""

    def __init__(self, config: Any, rotary: Any) -> None:
        super().__init__()
        self.half = config.model_type == "gpt_oss"
        self.rates: dict[str | None, tuple[Tensor, float]] = {}
        by_layer: dict[str | None, Any] = {None: config.rope_parameters}
        if "full_attention" in config.rope_parameters:
            by_layer = {kind: config.rope_parameters[kind] for kind in config.layer_types}
        for kind, parameters in by_layer.items():
            prefix = "" if kind is None else f"{kind}_"
            rates = getattr(rotary, f"{prefix}inv_freq").double()
            if parameters["rope_type"] == "default":
                rates = parameters["rope_theta"] ** -(
                    torch.arange(len(rates)).double() / len(rates)
                )
            self.rates[kind] = rates, getattr(rotary, f"{prefix}attention_scaling")

    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None
    ) -> tuple[Tensor, Tensor]:
        rates, scaling = self.rates[layer_type]
        angles = position_ids.unsqueeze(-1) * rates
        angles = angles if self.half else torch.cat([angles, angles], dim=-1)
        return angles.cos() * scaling, angles.sin() * scaling


def exact(model: Any) -> Any:
    """The model in float64 throughout: transformers' own norms, angles and experts are in float32
    at most."""
    model = deepcopy(model)
    if hasattr(model.config, "num_local_experts"):
        model.set_experts_implementation("eager")
    model.model.rotary_emb = Angles(model.config, model.model.rotary_emb)
    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            model.set_submodule(name, Norm(module))
    return model


@families
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("gqa", {"local_window": None}),
        ("gqa", {"local_window": LENGTH, "sink_tokens": 0}),
        ("mha", {"local_window": LENGTH}),
        ("mka", {"local_window": LENGTH}),
        ("mka", {"local_window": 9} | EVERYTHING),
        ("fmka", {"local_window": None}),
    ],
)
@torch.no_grad()
def test_it_is_the_pretrained_model_where_nothing_is_left_out(
    kind: str, options: dict[str, Any], family: str
) -> None:
    """On rows that are longer than the sliding window; padded in front too."""
    model, ids = pretrained(family), tokens(2, LENGTH)
    converted = convert(model, kind, **options)
    wanted = exact(model)(ids).logits
    checks.close(exact(converted)(ids).logits, wanted)
    again = convert(converted, kind, **options)
    checks.close(exact(again)(ids).logits, wanted)
    left, mask = padded(ids)
    given = exact(converted)(
        left, attention_mask=mask, position_ids=positions_of(mask), use_cache=False
    ).logits
    checks.close(given[:, PADDING:][:1], wanted[:1])


PADDING = 3


def padded(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows behind columns that are padding in the first of them alone, and their mask."""
    left = torch.cat([tokens(len(ids), PADDING, seed=1), ids], dim=1)
    mask = torch.ones_like(left)
    mask[0, :PADDING] = 0
    return left, mask


@families
@torch.no_grad()
def test_it_is_the_pretrained_model_in_float32(family: str) -> None:
    """As transformers computes it, nothing of it replaced."""
    model, ids = pretrained(family, torch.float32), tokens(2, LENGTH)
    for kind, options in (("gqa", {}), ("mka", {"local_window": 9} | EVERYTHING)):
        checks.close(convert(model, kind, **options)(ids).logits, model(ids).logits)


@families
@torch.no_grad()
def test_a_window_is_of_the_full_layers_alone(family: str) -> None:
    converted = convert(pretrained(family), "mka", local_window=9, chunk_size=3, top_k=2)
    kinds = [type(layer) for layer in mechanisms(converted)]
    wanted = [MemoryKeyedAttention, GroupedQueryAttention]
    assert kinds == (wanted if family.startswith("qwen") else wanted[::-1])
    windows = {
        type(layer): (layer.local_window, layer.sink_tokens) for layer in mechanisms(converted)
    }
    assert windows == {MemoryKeyedAttention: (9, 4), GroupedQueryAttention: (7, 0)}
    kept = convert(converted, "gqa")
    assert sorted(layer.local_window or 0 for layer in mechanisms(kept)) == [7, 9]


@families
@torch.no_grad()
def test_it_decodes_as_it_reads_and_padding_does_not_matter(family: str) -> None:
    model = exact(convert(pretrained(family), "mka", local_window=9, chunk_size=3, top_k=2))
    ids = tokens(2, LENGTH)
    whole = model(ids, use_cache=False).logits
    for piece in (1, 5, 16):
        cache = memory_cache(model)
        parts = [
            model(part, use_cache=True, past_key_values=cache).logits
            for part in ids.split(piece, dim=1)
        ]
        checks.close(torch.cat(parts, dim=1), whole)
    sliding = next(
        n for n, layer in enumerate(mechanisms(model)) if isinstance(layer, GroupedQueryAttention)
    )
    layer = mechanisms(model)[sliding]
    held = [
        layer.state_nbytes(2, length, torch.float64, REVERSIBLE)
        for length in (LENGTH, 7 + REVERSIBLE, 1000)
    ]
    assert states(cache)[sliding].nbytes == held[0] < held[1] == held[2]
    model.generation_config.eos_token_id = None
    made = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(made, greedy_without_cache(model, ids, 6))
    left, mask = padded(ids)
    places, cache = positions_of(mask), memory_cache(model)
    given = model(left, attention_mask=mask, position_ids=places, use_cache=False).logits
    checks.close(given[0, PADDING:], whole[0])
    parts = []
    for stop in range(4, left.shape[1] + 4, 4):
        now = slice(stop - 4, stop)
        told = {
            "attention_mask": mask[:, :stop],
            "position_ids": places[:, now],
            "past_key_values": cache,
        }
        parts.append(model(left[:, now], **told).logits)
    checks.close(torch.cat(parts, dim=1)[0, PADDING:], whole[0])


@torch.no_grad()
@families
def test_it_is_the_same_after_saving(family: str, tmp_path: Any) -> None:
    model = convert(pretrained(family, torch.float32), "mka", local_window=9, chunk_size=3, top_k=2)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(tokens(1, LENGTH)).logits, model(tokens(1, LENGTH)).logits)


@families
def test_all_that_is_pretrained_learns(family: str) -> None:
    model = exact(convert(pretrained(family), "mka", local_window=9, chunk_size=3, top_k=2))
    model(tokens(1, LENGTH)).logits.square().sum().backward()
    for layer in mechanisms(model):
        names = [name for name, _ in layer.named_parameters() if name.startswith(PRETRAINED)]
        assert len(names) == {"gemma3": 6, "qwen2": 7, "gpt_oss": 9, "qwen3": 6}[family]
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
    config = Gemma3TextConfig(
        **LLAMA | TOKEN_IDS | GEMMA | {"num_hidden_layers": 6, "layer_types": kinds}
    )
    model = shake(AutoModelForCausalLM.from_config(config))
    choices: list[tuple[Any, list[int]]] = [("all", [1, 3, 5]), (2, [3]), ([5, 1], [1, 5])]
    for chosen, layers in choices:
        made = convert(model, "mka", local_window=9, chunk_size=3, memory_layers=chosen)
        found = [
            number
            for number, layer in enumerate(mechanisms(made))
            if isinstance(layer, MemoryKeyedAttention)
        ]
        assert found == layers
        assert [layer.local_window for layer in mechanisms(made)] == [7, 9] * 3
    with pytest.raises(
        InputError, match=r"memory_layers is .2.; .* list of layers that are not sliding: 1, 3, 5"
    ):
        convert(model, "mka", local_window=9, memory_layers=[2])
    with pytest.raises(InputError, match="every n-th layer by a number from 1 to 3"):
        convert(model, "mka", local_window=9, memory_layers=4)


WINDOW: dict[str, Any] = {
    "sliding_window": 7,
    "layer_types": ["full_attention", "sliding_attention"],
}


@torch.no_grad()
def test_what_layers_are_is_what_the_family_makes_of_its_configuration() -> None:
    """Llama has neither windows nor kinds of layers, and Mistral one window for all, whatever
    config.json holds."""
    ids = tokens(2, LENGTH)
    for made, window in ((LlamaConfig, None), (MistralConfig, 7)):
        model = of_config(made(**LLAMA, **TOKEN_IDS, **WINDOW))
        converted = convert(model, "gqa")
        assert [layer.local_window for layer in mechanisms(converted)] == [window, window]
        checks.close(exact(converted)(ids).logits, exact(model)(ids).logits)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
@torch.no_grad()
def test_layers_that_are_all_of_one_kind(kind: str, family: str, tmp_path: Any) -> None:
    """A window that all layers have becomes that of the mechanism, but for a family whose kinds
    turn differently."""
    config: Any = FAMILIES[family]
    model, ids = (
        of_config(type(config)(**config.to_dict() | {"layer_types": [kind] * 2})),
        tokens(2, LENGTH),
    )
    if kind == "sliding_attention" and family == "gemma3":
        with pytest.raises(InputError, match="layer_types has 2 sliding layers and no other"):
            convert(model, "gqa")
        return
    converted = convert(model, "gqa")
    assert [layer.local_window for layer in mechanisms(converted)] == [
        7 if "sliding" in kind else None
    ] * 2
    checks.close(exact(converted)(ids).logits, exact(model)(ids).logits)
    checks.close(exact(convert(converted, "mha"))(ids).logits, exact(model)(ids).logits)
    memories = convert(model, "mka", local_window=9, chunk_size=3)
    assert [layer.local_window for layer in mechanisms(memories)] == [9, 9]
    memories.float().save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(again(ids).logits, memories(ids).logits)


def test_a_latent_attention_behind_a_sliding_layer_has_nothing_to_keep() -> None:
    for family in FAMILIES:
        with pytest.raises(InputError, match="model holds MultiHeadLatentAttention"):
            convert(build_model(FAMILIES[family], "mla", local_window=9), "gqa")


def test_kinds_of_layers_that_are_not_known() -> None:
    config: Any = deepcopy(FAMILIES["qwen2"])
    config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(
        InputError,
        match="layer_types has 'chunked_attention'; allowed: 'full_attention', 'sliding_at",
    ):
        build_model(config, "gqa")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"attn_logit_softcapping": 50.0},
            "attn_logit_softcapping is 50.0; the mechanisms need None",
        ),
        (
            {"use_bidirectional_attention": True},
            "use_bidirectional_attention is True; the mechanisms need False",
        ),
        (
            {"layer_types": ["sliding_attention"] * 2},
            "layer_types has 2 sliding layers and no other",
        ),
    ],
)
def test_what_is_refused(changes: dict[str, Any], message: str) -> None:
    config: Any = deepcopy(BACKBONES["gemma3"])
    model = AutoModelForCausalLM.from_config(type(config)(**config.to_dict() | changes))
    with pytest.raises(InputError, match=message):
        convert(model, "mka", local_window=9)
