"""The adapter speaks to any mechanism by the contract."""

import inspect
import re

import pytest
import torch
from torch import Tensor

from checks import close, rows
from checks_models import make_model, tokens
from mka.attention import ATTENTION_TYPES, CausalAttention
from mka.memory.entry import Entry
from mka.memory.state import State
from mka.models import AttentionAdapter, build, build_model, gpt2_config

CONFIG = gpt2_config(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=50,
    max_position_embeddings=40,
)
TOKENS = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(0))


class Running(CausalAttention):
    """A mechanism that no registry knows: the sum of the row so far."""

    def __init__(self) -> None:
        super().__init__(16, 4, 4, None, None, False, None)

    def mix(self, x: Tensor, positions: Tensor | None, state: State | None) -> Tensor:
        return x.cumsum(1)

    @property
    def num_parameters(self) -> int:
        return 0

    def state_entries(self, dtype: torch.dtype) -> dict[str, Entry]:
        return {"sum": Entry((self.hidden_size,), dtype, latest=1)}

    def flops_per_token(self, context: int) -> int:
        return self.hidden_size


def test_any_mechanism_will_do() -> None:
    x = rows(2, 9)
    y, weights = AttentionAdapter(Running())(
        x, attention_mask=None, cache_position=None, output_attentions=False
    )
    assert torch.equal(y, x.cumsum(1))
    assert weights is None


def test_a_mask_of_ones_and_zeros_becomes_valid_tokens() -> None:
    x, mask = rows(2, 9), torch.tensor([[0, 1, 1, 0, 1, 1, 1, 1, 0], [1] * 9])
    y, _ = AttentionAdapter(Running())(x, attention_mask=mask)
    close(y, (x * mask[..., None]).cumsum(1) * mask[..., None])


def test_the_adapter_knows_no_mechanism() -> None:
    source = inspect.getsource(AttentionAdapter)
    names = [*ATTENTION_TYPES, *(kind.__name__ for kind in ATTENTION_TYPES.values())]
    assert not [name for name in names if re.search(rf"\b{name}\b", source)]
    quoted = re.findall(r'"([a-z0-9_]+)"', inspect.getsource(build))
    assert [name for name in quoted if name in ATTENTION_TYPES] == []


@pytest.mark.parametrize("kind", ATTENTION_TYPES)
def test_padding_reaches_every_block(kind: str) -> None:
    """A padded row's logits are those of the row alone: no block has seen the padding."""
    model = build_model(CONFIG, kind).eval()
    padded = torch.cat([torch.full((2, 4), 7), TOKENS], dim=1)
    mask = (torch.arange(16) >= 4).long().expand(2, -1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
        close(logits, model(TOKENS).logits)


@pytest.mark.parametrize("kind", ATTENTION_TYPES)
def test_the_model_is_causal(kind: str) -> None:
    model = build_model(CONFIG, kind)
    inputs = model.transformer.wte(TOKENS).detach().requires_grad_()
    logits = model(inputs_embeds=inputs).logits
    (grad,) = torch.autograd.grad(logits[:, 5].sum(), inputs)
    assert (grad[:, 6:] == 0).all()
    assert (grad[:, :6] != 0).any(-1).all()


def test_an_option_that_a_mechanism_does_not_have_is_an_error() -> None:
    with pytest.raises(ValueError, match="mha has no option 'chunk_size'"):
        build_model(CONFIG, "mha", chunk_size=3)
    with pytest.raises(ValueError, match="nearest: 'mha'"):
        build_model(CONFIG, "mhaa")


@pytest.mark.parametrize("kind", ["gqa", "mla", "mka", "fmka"])
@torch.no_grad()
def test_padding_is_no_document(kind: str) -> None:
    """Whatever position it has."""
    model, ids = make_model("llama", kind), tokens(2, 9)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 0, 0]])
    for padded in (
        (mask.cumsum(1) - 1).clamp(min=0),
        (mask.cumsum(1) - 1).masked_fill(mask == 0, 1),
    ):
        output = model(ids, attention_mask=mask, position_ids=padded)
        assert output.past_key_values.get_seq_length() == 9


def test_blocks_that_are_not_numbered_from_zero_are_refused() -> None:
    model = make_model("llama", "gqa")
    del model.model.layers[0]
    model.config.num_hidden_layers = 1
    with pytest.raises(
        ValueError, match=r"the layers are numbered \[1\], and a cache counts them from 0"
    ):
        model(tokens(1, 5), use_cache=True)
