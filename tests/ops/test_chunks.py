"""Attention chunk by chunk, and by gathering, against one attention under a dense mask, forward and
backward."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from checks import close
from mka.memory import longterm
from mka.memory.longterm import Retrieved, gather_chunks, gathered_sums
from mka.ops import chunks, unions
from mka.ops.attend import attend_masked
from mka.ops.chunks import chunk_attention, chunk_sums
from mka.ops.unions import attend_unions, union_sums

Way = Callable[..., Tensor]

# rows, queries, keys, heads, groups, head size, chunk size, top-k
CASES = [
    (1, 1, 4, 2, 1, 4, 4, 1),
    (2, 63, 63, 4, 2, 8, 7, 3),
    (1, 1000, 1000, 2, 2, 4, 16, 4),
    (3, 40, 200, 4, 4, 4, 5, 2),
    (2, 33, 64, 4, 1, 4, 64, 2),
    (2, 50, 47, 2, 1, 4, 6, 20),
    (1, 70, 9, 2, 2, 4, 1, 9),
]
cases = pytest.mark.parametrize("case", CASES, ids=str)


def by_sorting(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    retrieved: Retrieved,
    chunk_size: int,
    seen: Tensor | None = None,
) -> Tensor:
    return chunk_attention(q, k, v, *retrieved, chunk_size, seen)[0]


def by_gathering(*inputs: Any) -> Tensor:
    return gather_chunks(*inputs).values


def by_unions(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    retrieved: Retrieved,
    chunk_size: int,
    seen: Tensor | None = None,
) -> Tensor:
    together = attend_unions(q, k, v, *retrieved, chunk_size, seen)
    assert together is not None
    return together[0]


def under_a_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    retrieved: Retrieved,
    chunk_size: int,
    seen: Tensor | None = None,
) -> Tensor:
    """The plain form: every query is compared with every key."""
    reach = k.shape[1] // chunk_size * chunk_size
    mask = chunk_mask(retrieved, k.shape[1] // chunk_size, chunk_size)
    mask = mask if seen is None else mask & seen[:reach]
    return attend_masked(q, k[:, :reach], v[:, :reach], mask).values


@pytest.fixture(autouse=True)
def any_union(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random choices are not alike; here they are read together all the same."""
    monkeypatch.setattr(unions, "LARGEST_UNION", 10**6)


def chunk_mask(retrieved: Retrieved, num_chunks: int, chunk_size: int) -> Tensor:
    mask = torch.zeros(*retrieved.chunk.shape[:3], num_chunks, dtype=torch.bool)
    for place in retrieved.found.nonzero().tolist():
        mask[(*place[:3], int(retrieved.chunk[tuple(place)]))] = True
    return mask.repeat_interleave(chunk_size, dim=-1)


def inputs(
    case: tuple[int, ...], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Retrieved, int]:
    """Random choices, some of them missing; the first queries find nothing, the first key/value
    head little."""
    rows, queries, keys, heads, groups, width, chunk_size, top_k = case
    generator = torch.Generator().manual_seed(sum(case))
    q, k, v = (
        torch.randn(rows, tokens, n, width, generator=generator, dtype=dtype).requires_grad_()
        for tokens, n in ((queries, heads), (keys, groups), (keys, groups))
    )
    scores = torch.rand(rows, queries, groups, keys // chunk_size, generator=generator)
    chunk = scores.argsort(-1)[..., :top_k]
    chunk = torch.nn.functional.pad(chunk, (0, top_k - chunk.shape[-1]))
    found = torch.rand(chunk.shape, generator=generator) < 0.8
    found[..., keys // chunk_size :] = False
    found[:, : queries // 3] = False
    found[:, :, 0] &= torch.rand(chunk.shape[:2], generator=generator).unsqueeze(-1) < 0.5
    return q, k, v, Retrieved(chunk.masked_fill(~found, 0), found), chunk_size


def gradients(y: Tensor, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    return torch.autograd.grad(y, inputs, direction)


@pytest.mark.parametrize("way", [by_sorting, by_gathering, by_unions])
@cases
def test_equals_attention_under_a_mask(case: tuple[int, ...], way: Way) -> None:
    q, k, v, retrieved, chunk_size = inputs(case)
    fast, plain = way(q, k, v, retrieved, chunk_size), under_a_mask(q, k, v, retrieved, chunk_size)
    close(fast, plain)
    for ours, theirs in zip(gradients(fast, (q, k, v)), gradients(plain, (q, k, v)), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("way", [by_sorting, by_gathering, by_unions])
@cases
def test_tokens_that_are_not_seen(case: tuple[int, ...], way: Way) -> None:
    """The first tokens of every row, but never a whole chunk."""
    q, k, v, retrieved, chunk_size = inputs(case)
    seen = torch.arange(k.shape[1]) >= min(3, chunk_size - 1)
    fast, plain = (f(q, k, v, retrieved, chunk_size, seen) for f in (way, under_a_mask))
    close(fast, plain)
    for ours, theirs in zip(gradients(fast, (q, k, v)), gradients(plain, (q, k, v)), strict=True):
        close(ours, theirs)


@pytest.mark.parametrize(
    ("name", "size"), [("QUERIES", 3), ("QUERIES", 1), ("GATHERED", 1), ("GATHERED", 700)]
)
@cases
def test_tiles_of_neighbors_change_nothing(
    case: tuple[int, ...], name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v, retrieved, chunk_size = inputs(case)
    whole = attend_unions(q, k, v, *retrieved, chunk_size, None)
    monkeypatch.setattr(unions, name, size)
    cut = attend_unions(q, k, v, *retrieved, chunk_size, None)
    assert whole is not None
    assert cut is not None
    close(cut[0], whole[0])
    close(cut[1].exp(), whole[1].exp())


@pytest.mark.parametrize("hidden", [0, 3])
@pytest.mark.parametrize(("name", "size"), [("QUERIES", 32), ("QUERIES", 3), ("GATHERED", 1)])
@cases
def test_sums_of_each_chunk(
    case: tuple[int, ...], hidden: int, name: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every way, against the scores of every query with every key."""
    q, k, _, retrieved, chunk_size = inputs(case)
    heads, groups = case[3:5]
    scores = torch.einsum("btgrd,bsgd->btgsr", q.unflatten(2, (groups, -1)), k) / q.shape[-1] ** 0.5
    seen = torch.arange(k.shape[1]) >= hidden if hidden else None
    scores = scores if seen is None else scores.masked_fill(~seen[:, None], -torch.inf)
    reach = k.shape[1] // chunk_size * chunk_size
    every = scores[:, :, :, :reach].unflatten(3, (-1, chunk_size)).logsumexp(4)
    wanted = every.gather(3, retrieved.chunk[..., None].expand(-1, -1, -1, -1, heads // groups))
    wanted = wanted.masked_fill(~retrieved.found[..., None], -torch.inf)
    monkeypatch.setattr(unions, name, size)
    for ours in (
        chunk_sums(q, k, *retrieved, chunk_size, seen),
        gathered_sums(q, k, retrieved, chunk_size, seen),
        gathered_sums(q, k, retrieved, chunk_size, sinks=hidden),
        union_sums(q, k, *retrieved, chunk_size, seen),
    ):
        assert ours is not None
        close(ours.exp(), wanted.exp())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_sums_do_not_depend_on_the_way(
    dtype: torch.dtype, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is chosen by them would depend on it too, and the way depends on the whole call."""
    q, k, _, retrieved, chunk_size = inputs(CASES[2])
    q, k = (x.detach().to(torch.float32 if autocast else dtype) for x in (q, k))
    found = []
    for gathered, union in ((10**9, 0), (0, 10**9), (0, 0)):
        monkeypatch.setattr(longterm, "GATHERED_PAIRS", gathered)
        monkeypatch.setattr(longterm, "GATHERED_PAIRS_PER_CHUNK", 0)
        monkeypatch.setattr(unions, "LARGEST_UNION", union)
        with torch.autocast("cpu", dtype, enabled=autocast):
            found.append(longterm.sums_in_chunks(q, k, retrieved, chunk_size))
    assert {sums.dtype for sums in found} == {torch.float32}
    for other in found[1:]:
        close(other.exp(), found[0].exp())


def test_the_operator_of_sums() -> None:
    q, k, _, retrieved, chunk_size = inputs(CASES[1])
    torch.library.opcheck(
        torch.ops.mka.chunk_sums.default, (q.detach(), k.detach(), *retrieved, chunk_size, None)
    )


def test_neighbors_that_choose_differently_are_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """32 queries, each with a chunk of its own; then all of them with one."""
    q, k, v = (
        torch.randn(1, 32, 1, 4, generator=torch.Generator().manual_seed(0)) for _ in range(3)
    )
    chunk = torch.arange(32).view(1, 32, 1, 1)
    monkeypatch.setattr(unions, "LARGEST_UNION", 31)
    assert attend_unions(q, k, v, chunk, chunk >= 0, 1, None) is None
    assert union_sums(q, k, chunk, chunk >= 0, 1, None) is None
    assert attend_unions(q, k, v, chunk * 0, chunk >= 0, 1, None) is not None


@cases
def test_tiles_and_blocks_change_nothing(
    case: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    q, k, v, retrieved, chunk_size = inputs(case)
    whole = by_sorting(q, k, v, retrieved, chunk_size)
    expected = (whole, *gradients(whole, (q, k, v)))
    for name, size in (("QUERY_PAIRS", 37), ("BLOCK", 3), ("BLOCKS", 2)):
        monkeypatch.setattr(chunks, name, size)
    cut = by_sorting(q, k, v, retrieved, chunk_size)
    for ours, theirs in zip((cut, *gradients(cut, (q, k, v))), expected, strict=True):
        close(ours, theirs)


@pytest.mark.parametrize("way", [by_sorting, by_gathering, by_unions])
def test_nothing_found_reads_zeros_and_gives_no_gradient(way: Way) -> None:
    q, k, v, retrieved, chunk_size = inputs(CASES[1])
    read = way(q, k, v, retrieved, chunk_size)[:, : 63 // 3]
    assert (read == 0).all()
    assert all((grad == 0).all() for grad in gradients(read, (q, k, v)))


def test_the_log_sum_exp_is_that_of_the_scores() -> None:
    q, k, v, retrieved, chunk_size = inputs(CASES[3])
    scores = torch.einsum("btgrd,bsgd->btgrs", q.unflatten(2, (4, 1)), k) / 2
    mask = chunk_mask(retrieved, 40, chunk_size)
    expected = scores.masked_fill(~mask.unsqueeze(3), -torch.inf).logsumexp(-1).flatten(2)
    there = (expected > -torch.inf).detach()
    for lse in (
        chunk_attention(q, k, v, *retrieved, chunk_size, None)[1],
        gather_chunks(q, k, v, retrieved, chunk_size, lse=True).sums,
        attend_unions(q, k, v, *retrieved, chunk_size, None)[1],  # pyright: ignore[reportOptionalSubscript]
    ):
        close(lse.exp(), expected.exp())
        ours, theirs = (
            torch.autograd.grad(x[there].sin().sum(), [q, k], retain_graph=True)
            for x in (lse, expected)
        )
        for a, b in zip(ours, theirs, strict=True):
            close(a, b)


@pytest.mark.parametrize("keys", [9, 10])
def test_gradcheck_and_the_custom_operator(keys: int) -> None:
    q, k, v, retrieved, chunk_size = inputs((1, 12, keys, 2, 1, 2, 3, 2))
    seen = torch.arange(keys) >= 1

    def both(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        o, lse = chunk_attention(q, k, v, *retrieved, chunk_size, seen)
        return o, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(both, (q, k, v))
    torch.library.opcheck(
        torch.ops.mka.chunk_attention.default, (q, k, v, *retrieved, chunk_size, seen)
    )


@pytest.mark.parametrize("scale", [1e2, 1e-30])
def test_scores_far_apart(scale: float) -> None:
    q, k, v, retrieved, chunk_size = inputs(CASES[1])
    q = (q * scale).detach().requires_grad_()
    fast, plain = (
        by_sorting(q, k, v, retrieved, chunk_size),
        under_a_mask(q, k, v, retrieved, chunk_size),
    )
    close(fast, plain)
    for ours, theirs in zip(gradients(fast, (q, k, v)), gradients(plain, (q, k, v)), strict=True):
        close(ours, theirs)


def test_bfloat16_is_computed_in_float32() -> None:
    q, k, v, retrieved, chunk_size = inputs(CASES[1], torch.bfloat16)
    wide_q, wide_k, wide_v = (x.detach().float() for x in (q, k, v))
    exact = under_a_mask(wide_q, wide_k, wide_v, retrieved, chunk_size)
    read = by_sorting(q, k, v, retrieved, chunk_size)
    assert read.dtype == torch.float32
    close(read, exact)
    assert [grad.dtype for grad in gradients(read, (q, k, v))] == [torch.bfloat16] * 3


def test_keys_may_lie_as_a_cache_keeps_them() -> None:
    q, k, v, retrieved, chunk_size = inputs(CASES[1])
    keys, values = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    close(
        by_sorting(q, keys, values, retrieved, chunk_size),
        by_sorting(q, k, v, retrieved, chunk_size),
    )


def test_what_is_stored_does_not_grow_with_the_square_of_the_row() -> None:
    """The partial results of a tile of queries are the largest tensor, whatever T is."""
    from ops.test_linear_memory import LargestOutput

    operator: Any = chunk_attention
    sizes = []
    for tokens in (8192, 16384):
        q, k, v, retrieved, chunk_size = inputs((1, tokens, tokens, 2, 1, 4, 16, 4), torch.float32)
        with LargestOutput() as outputs:
            operator._init_fn(q, k, v, *retrieved, chunk_size, None)  # what it runs
        sizes.append(outputs.numel)
    assert sizes[1] <= 2 * sizes[0]
