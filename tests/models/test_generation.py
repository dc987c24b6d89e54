"""generate: every way of it gives what decoding without a cache gives."""

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import checks
from checks_models import BACKBONES, TWO_BACKBONES, greedy_without_cache, make_model, tokens
from mka.attention import ATTENTION_TYPES
from mka.models import mechanisms, states

every_kind = pytest.mark.parametrize("kind", ATTENTION_TYPES)
two_backbones = pytest.mark.parametrize("backbone", TWO_BACKBONES)
NEW = 24


def generate(model: Any, prompt: torch.Tensor, **options: Any) -> Any:
    plain = GenerationConfig(do_sample=False, max_new_tokens=NEW, pad_token_id=0)
    return model.generate(prompt, generation_config=plain, **options)


@every_kind
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("chunked", [None, 5])
def test_greedy(kind: str, backbone: str, chunked: int | None) -> None:
    model, prompt = make_model(backbone, kind, dtype=torch.float64), tokens(2, 11)
    options: dict[str, Any] = {} if chunked is None else {"prefill_chunk_size": chunked}
    assert torch.equal(generate(model, prompt, **options), greedy_without_cache(model, prompt, NEW))


@every_kind
@two_backbones
def test_left_padding(kind: str, backbone: str) -> None:
    model, prompts = (
        make_model(backbone, kind, dtype=torch.float64),
        [tokens(1, 11), tokens(1, 4, seed=3)],
    )
    padded = torch.cat(
        [prompts[0], torch.cat([torch.zeros(1, 7, dtype=torch.long), prompts[1]], dim=1)]
    )
    mask = torch.ones_like(padded)
    mask[1, :7] = 0
    given = generate(model, padded, attention_mask=mask)
    for row, prompt in enumerate(prompts):
        assert torch.equal(
            given[row, 11:], greedy_without_cache(model, prompt, NEW)[0, prompt.shape[1] :]
        )


@every_kind
@two_backbones
def test_beam_search(kind: str, backbone: str) -> None:
    model, prompt = make_model(backbone, kind, dtype=torch.float64), tokens(2, 9)
    with_cache, without = (
        generate(model, prompt, num_beams=3, use_cache=cached) for cached in (True, False)
    )
    assert torch.equal(with_cache, without)


@every_kind
@two_backbones
def test_sampling(kind: str, backbone: str) -> None:
    model, prompt, drawn = make_model(backbone, kind, dtype=torch.float64), tokens(2, 9), []
    for cached in (True, False):
        torch.manual_seed(3)
        drawn.append(
            generate(
                model, prompt, do_sample=True, top_k=5, num_return_sequences=2, use_cache=cached
            )
        )
    assert torch.equal(*drawn)
    assert not torch.equal(drawn[0][0], drawn[0][1])


@every_kind
@two_backbones
def test_assisted_decoding(kind: str, backbone: str) -> None:
    """A draft that is often wrong: what it proposed in vain is taken back from both states."""
    model, draft, prompt = (
        make_model(backbone, kind, dtype=torch.float64),
        make_model(backbone, "gqa", dtype=torch.float64),
        tokens(1, 11),
    )
    assert torch.equal(
        generate(model, prompt, assistant_model=draft), greedy_without_cache(model, prompt, NEW)
    )
    assert torch.equal(
        generate(draft, prompt, assistant_model=model), greedy_without_cache(draft, prompt, NEW)
    )


@every_kind
@two_backbones
def test_several_turns_with_the_returned_cache(kind: str, backbone: str) -> None:
    model, row, cache = make_model(backbone, kind, dtype=torch.float64), tokens(1, 5), None
    for turn in range(3):
        row = torch.cat([row, tokens(1, 4, seed=turn + 10)], dim=1)
        wanted = greedy_without_cache(model, row, 7)
        told = {"past_key_values": cache, "return_dict_in_generate": True, "max_new_tokens": 7}
        # Without a mask transformers takes every 0 for padding, those that the model has said
        # included.
        given = generate(model, row, attention_mask=torch.ones_like(row), **told)
        row, cache = given.sequences, given.past_key_values
        assert torch.equal(row, wanted)
        assert states(cache)[0].num_tokens.tolist() == [row.shape[1] - 1]


@every_kind
def test_what_is_kept_does_not_depend_on_how_it_was_reached(kind: str) -> None:
    model, prompt = make_model("gpt2", kind, dtype=torch.float64), tokens(1, 11)
    given = generate(
        model, prompt, return_dict_in_generate=True, assistant_model=make_model("gpt2", "mha")
    )
    held = given.past_key_values
    for state, attention in zip(states(held), mechanisms(model), strict=True):
        assert state.nbytes == attention.state_nbytes(1, held.get_seq_length(), reversible=64)


def test_a_row_longer_than_the_positions_of_gpt2_says_what_to_do() -> None:
    model = make_model("gpt2", "fmka")
    with pytest.raises(ValueError, match=r"129 tokens; .* has 128 positions; .*rotary"):
        model(tokens(1, 129))
    with pytest.raises(ValueError, match="128 positions"):
        generate(model, tokens(1, 127))
    checks.close(*(make_model("llama", "fmka")(tokens(1, 300)).logits for _ in range(2)))
