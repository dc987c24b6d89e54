"""What several ranks agree on. The ranks are threads here; as processes they meet in
tests/distributed."""

import pytest
import torch

from mka.distributed import RankLost, Ranks, lost_ranks_said
from mka.errors import InputError
from thread_ranks import all_returned, on_ranks

COUNTS = [1, 2, 3, 5]


def test_alone() -> None:
    ranks = Ranks()
    assert (ranks.rank, ranks.count, ranks.is_main, ranks.device) == (
        0,
        1,
        True,
        torch.device("cpu"),
    )
    assert ranks.sum((1, 2.5)) == [1, 2.5]
    assert ranks.gather("a") == ["a"]
    ranks.check_same({"a": 1})
    with ranks.first_of_machine_first():
        ranks.part()
    values = torch.tensor([1.0, 2.0])
    ranks.broadcast(values)
    assert values.tolist() == [1, 2]


@pytest.mark.parametrize("count", COUNTS)
def test_sums_are_over_all_ranks_and_exact(count: int) -> None:
    """In float32 the odd numbers above 2**24 would be lost, and so would the small beside the
    large."""
    parts = [(2.0**24 + 1 + rank, 1e-9 * (rank + 1)) for rank in range(count)]
    sums = all_returned(on_ranks(count, lambda ranks: ranks.sum(parts[ranks.rank])))
    assert sums == [
        [
            sum(large for large, _ in parts),
            pytest.approx(sum(small for _, small in parts), rel=1e-15),
        ]
    ] * (count)


@pytest.mark.parametrize("count", COUNTS)
def test_gathered_in_order_and_the_first_ones_spread(count: int) -> None:
    def work(ranks: Ranks) -> tuple[list[str], list[float]]:
        values = torch.full((2,), float(ranks.rank + 7))
        ranks.broadcast(values)
        return ranks.gather(f"rank {ranks.rank}"), values.tolist()

    assert (
        all_returned(on_ranks(count, work))
        == [([f"rank {rank}" for rank in range(count)], [7.0, 7.0])] * count
    )


@pytest.mark.parametrize("count", COUNTS)
def test_on_main_is_called_once_and_heard_by_all(count: int) -> None:
    called: list[int] = []

    def work(ranks: Ranks) -> object:
        return ranks.on_main(lambda: (called.append(ranks.rank), {"answer": 42})[1])

    assert all_returned(on_ranks(count, work)) == [{"answer": 42}] * count
    assert called == [0]


@pytest.mark.parametrize("count", COUNTS)
def test_a_mistake_found_on_main_is_raised_on_all(count: int) -> None:
    def refuse() -> None:
        raise InputError("batch_size is 3")

    ended = on_ranks(count, lambda ranks: ranks.on_main(refuse))
    assert [(type(error), str(error)) for error in ended] == [
        (InputError, "batch_size is 3")
    ] * count


@pytest.mark.parametrize("count", COUNTS)
def test_a_disk_that_fails_main_is_known_to_all(count: int) -> None:
    """Or the others would wait for an answer that never comes."""

    def fail() -> None:
        raise OSError(28, "No space left on device")

    ended = on_ranks(count, lambda ranks: ranks.on_main(fail))
    assert [(type(error), getattr(error, "errno", None)) for error in ended] == [
        (OSError, 28)
    ] * count


def settings(rank: int, odd: int, change: dict[str, object]) -> dict[str, object]:
    """The same on all but one."""
    same: dict[str, object] = {
        "learning_rate": 1e-3,
        "seeds": (0, 1),
        "text_path": None,
        "model": {"layers": 2},
    }
    return same | change if rank == odd else same


@pytest.mark.parametrize("count", COUNTS)
def test_ranks_that_agree(count: int) -> None:
    all_returned(on_ranks(count, lambda ranks: ranks.check_same(settings(ranks.rank, -1, {}))))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learning_rate": 2e-3}, "learning_rate is {0.001} and {0.002}"),
        ({"seeds": (0,)}, "seeds is {[0, 1]} and {[0]}"),
        ({"text_path": ""}, "text_path is {None} and {''}"),
        ({"model": {"layers": 3}}, "model is {{'layers': 2}} and {{'layers': 3}}"),
        ({"mka": "0.2"}, "mka is {None} and {'0.2'}"),
    ],
    ids=str,
)
@pytest.mark.parametrize(("count", "odd"), [(2, 0), (2, 1), (4, 0), (4, 2)])
def test_a_rank_that_differs_is_named_on_all(
    count: int, odd: int, change: dict[str, object], said: str
) -> None:
    ended = on_ranks(count, lambda ranks: ranks.check_same(settings(ranks.rank, odd, change)))
    name, values = said.split(" is ")
    usual, changed = (value[1:-1] for value in values.split(" and "))
    first, other = (changed, usual) if odd == 0 else (usual, changed)
    line = f"the ranks differ: {name} is {first} on rank 0 and {other} on rank {odd or 1}; "
    assert [type(error) for error in ended] == [InputError] * count
    assert {str(error) for error in ended} == {line + "start all with the same command"}


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[/pytorch/gloo/transport/tcp/pair.cc:547]\n  Connection closed by peer [127.0.0.1]:1"
        ),
        torch.distributed.DistBackendError("NCCL error: remote process exited"),
        torch.distributed.DistNetworkError("timed out"),
    ],
    ids=str,
)
def test_a_broken_collective_is_a_lost_rank_on_one_line(error: RuntimeError) -> None:
    with (
        pytest.raises(RankLost, match=r"^lost another rank at step 3: [^\n]+$"),
        lost_ranks_said("at step 3"),
    ):
        raise error


@pytest.mark.parametrize(
    "error", [RuntimeError("out of memory"), ValueError("gloo"), NotImplementedError("gloo")]
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, lost_ranks_said("at step 3"):
        raise error
    assert caught.value is error
