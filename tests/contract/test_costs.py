"""Costs are functions of the configuration, and agree with what is counted."""

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import checks
from mka.attention.naive import naive, twin_of

every_case = pytest.mark.parametrize(("kind", "variant"), checks.CASES)
TOKENS = 29


@every_case
def test_parameters(kind: str, variant: str) -> None:
    attn = checks.make(kind, variant)
    assert attn.num_parameters == sum(p.numel() for p in attn.parameters())


@every_case
def test_flops_add_up_to_those_of_the_naive_twin(kind: str, variant: str) -> None:
    attn = checks.make(kind, variant)
    predicted = sum(attn.flops_per_token(t) for t in range(1, TOKENS + 1))
    if kind == "mla":
        predicted += absorbed_minus_expanded(attn)
    with FlopCounterMode(display=False) as counter:
        naive(attn, checks.rows(1, TOKENS))
    assert counter.get_total_flops() == predicted


def absorbed_minus_expanded(attn: Any) -> int:
    """The twin of mla scores and reads latents: per key 4 H R (+ 2 H D_rope) where the expanded
    form takes 4 H D."""
    heads, rank = attn.num_heads, attn.kv_lora_rank
    keys = sum(attn.keys_attended(t) for t in range(1, TOKENS + 1))
    # Without a rotary part the twin multiplies empty vectors, which counts as nothing.
    return keys * (4 * heads * rank - 4 * attn.inner_size)


@every_case
@pytest.mark.parametrize("tokens", [1, 2, 12, TOKENS])
def test_state_is_what_the_naive_twin_holds(kind: str, variant: str, tokens: int) -> None:
    attn = checks.make(kind, variant)
    steps: Any = twin_of(attn)(attn, checks.rows(1, tokens)[0], torch.arange(tokens))
    for _ in range(tokens):
        next(steps)
    narrow, wide, whole = held_numbers(kind, attn, steps.gi_frame.f_locals)
    assert attn.state_nbytes(1, tokens) == 8 * (narrow + wide + whole)
    assert attn.state_nbytes(3, tokens, torch.bfloat16) == 3 * (2 * narrow + 4 * wide + 8 * whole)


def held_numbers(kind: str, attn: Any, held: dict) -> tuple[int, int, int]:
    """Numbers in the twin's lists that a later token can still read; those apart that stay in
    float32, and those that are whole numbers."""

    def latest(name: str) -> int:
        kept = len(held[name]) if attn.window is None else attn.window.reach + attn.sink_tokens
        return sum(x.numel() for x in held[name][:kept])

    def everything(name: str) -> int:
        return sum(x.numel() for x in held[name])

    if kind not in ("mla", "mka", "fmka"):  # a twin keeps what a cache would in these lists
        return sum(latest(name) for name in ("keys", "values") if name in held), 0, 0
    if kind == "mla":
        return latest("latents") + (latest("rope_keys") if attn.qk_rope_head_dim else 0), 0, 0
    average = 0 if attn.session is None else held["session"].m.numel()
    if kind == "fmka":
        open_chunk = attn.hidden_size if attn.top_k else 0
        narrow = latest("keys") + latest("values") + everything("index_keys")
        return narrow, average + open_chunk + everything("means"), 0
    narrow = latest("placed") + latest("values") + everything("slots") + everything("slot_values")
    if not attn.top_k:
        return narrow, average, 0
    chunks = len(held["raw"]) // attn.chunk_size
    stand_apart = attn.rotary is not None and attn.longterm_positions == "true"
    narrow += (
        everything("raw") + everything("values") + chunks * attn.kv_size * (2 if stand_apart else 1)
    )
    return narrow, average + attn.kv_size, chunks if stand_apart else 0


@pytest.mark.parametrize("kind", ["mla"])
def test_latent_cache_is_smaller_than_the_keys_and_values_of_mha(kind: str) -> None:
    sizes = {"hidden_size": 256, "num_heads": 8}
    latent, full = (checks.build_attention(name, **sizes) for name in (kind, "mha"))
    assert latent.state_nbytes(1, 100) * 4 == full.state_nbytes(1, 100)
