"""The softmax seam against a dense masked softmax written out by hand."""

import pytest
import torch
from torch import Tensor

from checks import close
from mka.ops import attend
from mka.ops.attend import (
    MIN_BLOCK,
    Read,
    Window,
    attend_masked,
    attend_window,
    both,
    mixed,
    shares_of,
)

WINDOWS = [1, 2, MIN_BLOCK - 1, MIN_BLOCK, MIN_BLOCK + 1, 2 * MIN_BLOCK, 100, None]
LENGTHS = [1, 63, 64, 65, 127, 128, 129, 200, 1000]
EDGES = [
    (tokens, window)
    for tokens in LENGTHS
    for window in WINDOWS
    if tokens < 1000 or window in (63, 64, 65)
]


def heads(
    tokens: int,
    num_heads: int = 4,
    groups: int = 2,
    size: int = 6,
    v_size: int = 6,
    dtype: torch.dtype = torch.float64,
    slots: int | None = None,
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    slots = tokens if slots is None else slots
    shapes = [(2, tokens, num_heads, size), (2, slots, groups, size), (2, slots, groups, v_size)]
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """mask (T, S) or (B, T, G, S)."""
    repeats = q.shape[2] // k.shape[2]
    k, v = (x.repeat_interleave(repeats, dim=2) for x in (k, v))
    scores = torch.einsum("bthd,bshd->bths", q, k) * (
        q.shape[-1] ** -0.5 if scale is None else scale
    )
    seen = mask[None, :, None] if mask.dim() == 2 else mask.repeat_interleave(repeats, dim=2)
    odds = (scores - scores.detach().amax(-1, keepdim=True)).exp() * seen
    total = odds.sum(-1, keepdim=True)
    return torch.einsum("bths,bshd->bthd", odds / torch.where(total == 0, 1, total), v)


def causal(tokens: int, window: int | None) -> Tensor:
    t = torch.arange(tokens)
    distance = t[:, None] - t
    return (distance >= 0) & (distance < (tokens if window is None else window))


def attend_causal(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float | None = None
) -> Tensor:
    return attend.attend_causal(q, k, v, None if window is None else Window(window), scale).values


def same_outputs_and_gradients(fast: Tensor, slow: Tensor, inputs: list[Tensor]) -> None:
    close(fast, slow)
    direction = torch.randn(
        fast.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64
    ).to(fast.dtype)
    for a, b in zip(
        *(torch.autograd.grad(y, inputs, direction) for y in (fast, slow)), strict=True
    ):
        close(a, b)


@pytest.mark.parametrize(("tokens", "window"), EDGES)
def test_windows_and_lengths_around_the_blocks(tokens: int, window: int | None) -> None:
    q, k, v = heads(tokens)
    same_outputs_and_gradients(
        attend_causal(q, k, v, window), dense(q, k, v, causal(tokens, window)), [q, k, v]
    )


@pytest.mark.parametrize("window", [1, 5, 64, 70, None])
@pytest.mark.parametrize(("num_heads", "groups"), [(4, 4), (4, 1), (6, 3), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_groups(window: int | None, num_heads: int, groups: int, dtype: torch.dtype) -> None:
    q, k, v = heads(133, num_heads, groups, dtype=dtype)
    same_outputs_and_gradients(
        attend_causal(q, k, v, window), dense(q, k, v, causal(133, window)), [q, k, v]
    )


@pytest.mark.parametrize("window", [None, 3, 65])
@pytest.mark.parametrize("v_size", [1, 4, 8])
def test_values_narrower_than_keys(window: int | None, v_size: int) -> None:
    q, k, v = heads(130, size=8, v_size=v_size)
    out = attend_causal(q, k, v, window)
    assert out.shape == (2, 130, 4, v_size)
    same_outputs_and_gradients(out, dense(q, k, v, causal(130, window)), [q, k, v])


@pytest.mark.parametrize("window", [None, 3])
def test_scale(window: int | None) -> None:
    q, k, v = heads(70)
    close(attend_causal(q, k, v, window, scale=0.7), dense(q, k, v, causal(70, window), scale=0.7))


@pytest.mark.parametrize("window", [None, 1, 7, 63, 64, 65])
def test_values_beyond_the_window_and_in_the_future_have_no_weight(window: int | None) -> None:
    tokens, t = 200, 131
    q, k, v = heads(tokens, num_heads=2, groups=2)
    (reached,) = torch.autograd.grad(attend_causal(q, k, v, window)[:, t].sum(), v)
    expected = causal(tokens, window)[t]
    assert torch.equal(reached.abs().sum((0, 2, 3)) > 0, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("per_head", [False, True])
def test_masked_rows_that_see_nothing_give_zeros_and_finite_gradients(
    dtype: torch.dtype, per_head: bool
) -> None:
    q, k, v = heads(19, dtype=dtype, slots=11)
    shape = (2, 19, 2, 11) if per_head else (19, 11)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(2)) < 0.3
    empty = torch.zeros(19, dtype=torch.bool)
    empty[[0, 1, 7, 18]] = True
    mask = mask & (~empty[None, :, None, None] if per_head else ~empty[:, None])
    out = attend_masked(q, k, v, mask).values
    assert (out[:, empty] == 0).all()
    grads = torch.autograd.grad(out.sum(), [q, k, v], retain_graph=True)
    assert all(grad.isfinite().all() for grad in grads)
    same_outputs_and_gradients(out, dense(q, k, v, mask), [q, k, v])


def test_a_mask_with_no_true_at_all() -> None:
    q, k, v = heads(5, slots=3)
    out = attend_masked(q, k, v, torch.zeros(5, 3, dtype=torch.bool)).values
    assert (out == 0).all()
    assert all((g == 0).all() for g in torch.autograd.grad(out.sum(), [q, k, v]))


RULES = [
    Window(5, 4),
    Window(64, 1),
    Window(70, 4),
    Window(5, 4, chunk=3),
    Window(66, 6, chunk=7),
    Window(9, 2, chunk=64),
    Window(6, 3, chunk=4, until=90),
    Window(30, 4, until=133),
]
every_rule = pytest.mark.parametrize("window", RULES, ids=str)


def seen_by(window: Window, first: int, tokens: int) -> Tensor:
    """(tokens, first + tokens) bool: what the rule says, one pair at a time."""
    rows = []
    for t in range(first, first + tokens):
        begin = (t + 1 - window.size) // window.chunk * window.chunk
        sinks = 0 if window.until is not None and t > window.until else window.sinks
        rows.append([s <= t and (s >= begin or s < sinks) for s in range(first + tokens)])
    return torch.tensor(rows)


def log_sums(q: Tensor, k: Tensor, mask: Tensor) -> Tensor:
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bthd,bshd->bths", q, k) * q.shape[-1] ** -0.5
    return scores.masked_fill(~mask[None, :, None], -torch.inf).logsumexp(-1)


@every_rule
@pytest.mark.parametrize("tokens", [7, 64, 65, 131, 200, 300])
@pytest.mark.parametrize("lse", [False, True])
def test_sinks_chunks_and_distances_around_the_blocks(
    window: Window, tokens: int, lse: bool
) -> None:
    q, k, v = heads(tokens)
    mask = seen_by(window, 0, tokens)
    read = attend.attend_causal(q, k, v, window, lse=lse)
    same_outputs_and_gradients(read.values, dense(q, k, v, mask), [q, k, v])
    if lse:
        sums = attend.attend_causal(q, k, v, window, lse=True).sums
        close(sums, log_sums(q, k, mask))
        ours, theirs = (
            torch.autograd.grad(x.sin().sum(), [q, k]) for x in (sums, log_sums(q, k, mask))
        )
        for a, b in zip(ours, theirs, strict=True):
            close(a, b)


@every_rule
@pytest.mark.parametrize("first", [1, 5, 63, 64, 140])
@pytest.mark.parametrize("tokens", [1, 65, 150])
def test_a_window_that_goes_on_after_keys_before(window: Window, first: int, tokens: int) -> None:
    """Of the keys before, as many as the windows reach; the sinks come on their own."""
    whole = heads(first + tokens)
    q, k, v = whole[0][:, first:], *whole[1:]
    before = min(first, window.reach - 1)
    mask = seen_by(window, first, tokens)
    sinks = k[:, : window.sinks], v[:, : window.sinks]
    read = attend_window(
        q, k[:, first - before :], v[:, first - before :], sinks, window, first, lse=True
    )
    same_outputs_and_gradients(read.values, dense(q, k, v, mask), whole)
    close(read.sums, log_sums(q, k, mask))


@every_rule
def test_tokens_seen_are_counted(window: Window) -> None:
    seen = seen_by(window._replace(until=None), 0, 150).sum(1).tolist()
    assert [window.tokens_seen(t + 1) for t in range(150)] == seen
    t = torch.arange(150)
    assert torch.equal(window.sees(t[:, None], t), seen_by(window, 0, 150))


def test_two_reads_are_one_softmax() -> None:
    """Of four keys each, one of the first read's queries without any, and one of both."""
    q, k, v = heads(6, slots=8)
    mask = torch.rand(6, 8, generator=torch.Generator().manual_seed(1)) < 0.7
    mask[1, :4], mask[2], mask[3, 4:] = False, False, False
    parts = [
        attend_masked(q, k[:, s], v[:, s], mask[:, s], lse=True) for s in (slice(0, 4), slice(4, 8))
    ]
    one = both(*parts)
    same_outputs_and_gradients(one.values, dense(q, k, v, mask), [q, k, v])
    close(one.sums.exp(), log_sums(q, k, mask).exp())


def test_shares_of_reads() -> None:
    """By hand: three reads of one number each, with scores 1, 2 and nothing, a bias and a
    factor."""
    q = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    reads = [
        Read(q + value, q[..., 0] + score)
        for value, score in ((3.0, 1.0), (5.0, 2.0), (7.0, -torch.inf))
    ]
    bias, factor = q[..., 0] - 0.5, torch.tensor(0.25, dtype=torch.float64, requires_grad=True)
    weights = shares_of(reads, [None, bias, bias], [None, factor, None]).flatten()
    a, b = torch.tensor(1.0).double().exp(), 0.25 * torch.tensor(1.5).double().exp()
    close(weights, torch.stack([a, b, a * 0]) / (a + b))
    close(mixed(weights.view(3, 1, 1, 1), reads).flatten(), (3 * a + 5 * b)[None] / (a + b))
    shut = shares_of(reads, [None, bias, bias], [None, factor * 0, None]).flatten()
    assert shut.tolist() == [1, 0, 0]


def test_a_factor_of_zero_shuts_what_matches_best_and_has_a_gradient() -> None:
    q = torch.zeros(1, 1, 1, 1)
    reads = [Read(q + 1, q[..., 0]), Read(q + 2, q[..., 0] + 1000)]
    factor = torch.zeros((), requires_grad=True)
    weights = shares_of(reads, [None, None], [None, factor])
    assert weights.flatten().tolist() == [1, 0]
    (slope,) = torch.autograd.grad(weights[1].sum(), factor)
    assert slope > 0
    assert slope.isfinite()


def test_what_was_not_asked_for_is_not_there() -> None:
    with pytest.raises(ValueError, match="lse=True"):
        _ = Read(torch.zeros(1)).sums
