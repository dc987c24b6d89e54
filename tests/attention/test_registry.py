"""The registry, the number of options, and one line for every option that is out of range."""

import inspect
from typing import Any

import pytest

import checks
from mka.attention import ATTENTION_TYPES, CausalAttention, build_attention
from mka.attention.naive import twin_of
from mka.ops.rotary import RotaryEmbedding
from mka.record.mechanisms import MECHANISMS

GROUPED = ("mha", "mqa", "gqa", "mka", "fmka")
WITH_GROUPS = ("gqa", "mka", "fmka")
MEMORY = ("mka", "fmka")

BAD_OPTIONS: list[tuple[tuple[str, ...], dict[str, Any], str]] = [
    (
        tuple(ATTENTION_TYPES),
        {"num_heads": 5},
        "num_heads is 5; it must divide hidden_size 16: 1, 2, 4, 8, 16",
    ),
    (tuple(ATTENTION_TYPES), {"num_heads": 0}, "num_heads is 0; it must be at least 1"),
    (tuple(ATTENTION_TYPES), {"hidden_size": 0}, "hidden_size is 0; it must be at least 1"),
    (tuple(ATTENTION_TYPES), {"local_window": 0}, "local_window is 0; it must be at least 1"),
    (tuple(ATTENTION_TYPES), {"local_window": -3}, "local_window is -3; it must be at least 1"),
    (WITH_GROUPS, {"num_kv_heads": 3}, "num_kv_heads is 3; it must divide the 4 heads: 1, 2, 4"),
    (WITH_GROUPS, {"num_kv_heads": 8}, "num_kv_heads is 8; it must divide the 4 heads: 1, 2, 4"),
    (WITH_GROUPS, {"num_kv_heads": 0}, "num_kv_heads is 0; it must divide the 4 heads: 1, 2, 4"),
    (tuple(ATTENTION_TYPES), {"num_heads": 4.0}, "num_heads is 4.0; it must be a whole number"),
    (
        tuple(ATTENTION_TYPES),
        {"local_window": "big"},
        "local_window is 'big'; it must be a whole number",
    ),
    (
        tuple(ATTENTION_TYPES),
        {"sink_tokens": True},
        "sink_tokens is True; it must be a whole number",
    ),
    (WITH_GROUPS, {"num_kv_heads": 2.0}, "num_kv_heads is 2.0; it must be a whole number"),
    (MEMORY, {"chunk_size": 8.5}, "chunk_size is 8.5; it must be a whole number"),
    (("mka",), {"max_distance": 99.5}, "max_distance is 99.5; it must be a whole number"),
    (MEMORY, {"chunk_size": 0}, "chunk_size is 0; it must be at least 1"),
    (MEMORY, {"top_k": -1}, "top_k is -1; it must be at least 0"),
    (MEMORY, {"top_k": -1, "local_window": None}, "top_k is -1; it must be at least 0"),
    (MEMORY, {"router_size": 0}, "router_size is 0; it must be at least 1"),
    *(
        (
            MEMORY,
            {"session_decay": decay},
            f"session_decay is {decay!r}; it must be 'learned', None or between 0 and 1",
        )
        for decay in (0, 0.0, 1, 1.0, 2, -0.5, True, float("nan"), "x")
    ),
    (("mka",), {"session_stride": 0}, "session_stride is 0; it must be at least 1"),
    (("fmka",), {"index_size": 0}, "index_size is 0; it must be at least 1"),
    (("mla",), {"kv_lora_rank": 0}, "kv_lora_rank is 0; it must be at least 1"),
    (("mla",), {"q_lora_rank": 0}, "q_lora_rank is 0; it must be at least 1"),
    (
        ("mla",),
        {"qk_rope_head_dim": 2},
        "qk_rope_head_dim is 2; it must be the head_dim of rotary, which is not given",
    ),
    (
        ("mla",),
        {"qk_rope_head_dim": 2, "rotary": RotaryEmbedding(4)},
        "qk_rope_head_dim is 2; it must be the head_dim of rotary, which is 4",
    ),
    (GROUPED, {"rotary": RotaryEmbedding(2)}, "rotary.head_dim is 2; it must be the head size, 4"),
    (GROUPED, {"rotary": RotaryEmbedding(8)}, "rotary.head_dim is 8; it must be the head size, 4"),
]
EACH = [(kind, options, message) for kinds, options, message in BAD_OPTIONS for kind in kinds]


@pytest.mark.parametrize(("kind", "options", "message"), EACH)
def test_an_option_out_of_range_is_one_line(
    kind: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        build_attention(kind, **{"hidden_size": 16, "num_heads": 4} | options)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("name", "nearest"), [("mak", "mka"), ("FMKA", "fmka"), ("gaq", "gqa"), ("mlaa", "mla")]
)
def test_an_unknown_name_lists_the_names_and_the_nearest(name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        build_attention(name, hidden_size=16, num_heads=4)
    assert repr(name) in str(error.value)
    assert ", ".join(ATTENTION_TYPES) in str(error.value)
    assert str(error.value).endswith(f"nearest: {nearest!r}")


def test_the_registry_is_what_the_configuration_offers() -> None:
    assert list(ATTENTION_TYPES) == list(MECHANISMS)
    assert len(set(ATTENTION_TYPES.values())) == len(ATTENTION_TYPES)


@pytest.mark.parametrize("kind", ATTENTION_TYPES)
def test_at_most_fifteen_options(kind: str) -> None:
    options = list(inspect.signature(ATTENTION_TYPES[kind]).parameters.values())
    assert len([option for option in options if option.kind is option.KEYWORD_ONLY]) <= 15
    assert all(option.annotation is not inspect.Parameter.empty for option in options)
    assert not [
        option for option in options if option.kind in (option.VAR_KEYWORD, option.VAR_POSITIONAL)
    ]


@pytest.mark.parametrize("kind", ATTENTION_TYPES)
def test_defaults_build_what_was_asked_for(kind: str) -> None:
    attn = build_attention(kind, hidden_size=64, num_heads=8)
    assert type(attn) is ATTENTION_TYPES[kind]
    assert isinstance(attn, CausalAttention)
    assert attn.num_kv_heads == {"mqa": 1, "gqa": 4}.get(kind, 8)


@pytest.mark.parametrize("kind", ATTENTION_TYPES)
def test_the_docstring_names_its_sources(kind: str) -> None:
    module = inspect.getmodule(ATTENTION_TYPES[kind])
    assert module is not None
    assert "arXiv" in (module.__doc__ or "")
    assert ATTENTION_TYPES[kind].__doc__


def test_every_mechanism_has_a_naive_twin() -> None:
    assert all(twin_of(checks.make(kind)) for kind in ATTENTION_TYPES)
