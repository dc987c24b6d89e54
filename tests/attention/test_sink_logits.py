"""Heads with a learned logit for attending to nothing, and with a scale of their own: the contract
holds for them."""

from typing import Any

import pytest
import torch

import checks
from checks_state import TOKENS, assert_split_changes_nothing, padding

KINDS = ("mha", "gqa", "mka", "fmka")
VARIANTS = ("small", "far", "no-window", "routed")
CASES = [
    (kind, variant)
    for kind in KINDS
    for variant in VARIANTS
    if variant not in checks.OF_MKA or kind == "mka"
]
every_case = pytest.mark.parametrize(("kind", "variant"), CASES)


def make(kind: str, variant: str) -> Any:
    attn: Any = checks.make(kind, variant)
    attn.query_factor = 0.7
    attn.learn_sink_logits()
    torch.nn.init.normal_(attn.sink_logits)
    return attn.double()


@every_case
def test_it_equals_the_naive_twin(kind: str, variant: str) -> None:
    attn, x = make(kind, variant), checks.rows(2, TOKENS)
    checks.assert_equals_naive(attn, x)
    checks.assert_equals_naive(attn, x, padding("interior", 2))


@every_case
def test_neither_the_future_nor_padding_is_seen(kind: str, variant: str) -> None:
    attn, valid = make(kind, variant), padding("left", 3)
    assert valid is not None
    checks.assert_no_gradient_from_future(attn, checks.rows(1, 20))
    checks.assert_largest_values_ignored(attn, checks.rows(1, 20))
    checks.assert_padding_ignored(attn, checks.rows(3, TOKENS), valid)


@every_case
def test_it_decodes_as_it_reads(kind: str, variant: str) -> None:
    attn, x = make(kind, variant), checks.rows(3, TOKENS)
    for cuts in ((1, 2, 3), (7, 20), tuple(range(1, TOKENS))):
        assert_split_changes_nothing(attn, x, cuts, padding("left", 3))


@every_case
def test_it_is_counted_and_it_matters(kind: str, variant: str) -> None:
    attn, x = make(kind, variant), checks.rows(1, 20)
    assert attn.num_parameters == sum(p.numel() for p in attn.parameters())
    y = attn(x)[0]
    y.square().sum().backward()
    assert (attn.sink_logits.grad != 0).all()
    with torch.no_grad():
        attn.sink_logits.fill_(-torch.inf)  # a logit that no softmax sees
    without: Any = checks.make(kind, variant).double()
    without.query_factor = 0.7
    without.load_state_dict(attn.state_dict(), strict=False)
    checks.close(attn(x)[0], without(x)[0])
    assert not torch.allclose(y, without(x)[0])
