"""Documents packed in one row are kept apart by every mechanism, at every level: they equal rows of
their own."""

import pytest
import torch
from torch import Tensor

import checks
from mka.attention import CausalAttention
from mka.errors import InputError
from mka.ops.packing import documents_of, pieces

every_case = pytest.mark.parametrize(("kind", "variant"), checks.CASES)
ROWS = [
    [[9, 1, 13], [23]],  # around windows of 5 and chunks of 3
    [[1, 1, 2, 19], [4, 5, 3, 11]],
    [[70, 5, 66, 1, 8], [150]],  # around blocks of 64
]
every_row = pytest.mark.parametrize("lengths", ROWS, ids=str)


def documents(lengths: list[list[int]]) -> Tensor:
    """(B, T): the number of each token's document."""
    return torch.stack(
        [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
    )


def places(lengths: list[list[int]]) -> Tensor:
    return torch.stack([torch.cat([torch.arange(length) for length in row]) for row in lengths])


def alone(attn: CausalAttention, x: Tensor, lengths: list[list[int]]) -> Tensor:
    """Each document as a row of its own."""
    rows = [
        torch.cat([attn(part)[0] for part in row[None].split(sizes, 1)], 1)
        for row, sizes in zip(x, lengths, strict=True)
    ]
    return torch.cat(rows)


@every_case
@every_row
def test_equal_rows_of_their_own(kind: str, variant: str, lengths: list[list[int]]) -> None:
    """Outputs and gradients."""
    attn, numbers = checks.make(kind, variant), documents(lengths)
    x = checks.rows(len(lengths), numbers.shape[1]).requires_grad_()
    together, apart = attn(x, documents=numbers)[0], alone(attn, x, lengths)
    checks.close(together, apart)
    checks.close(attn(x, positions=places(lengths), documents=numbers)[0], apart)
    direction = checks.rows(len(lengths), numbers.shape[1], seed=5)
    wanted = [x, *attn.parameters()]
    grads = [
        torch.autograd.grad(y, wanted, direction, allow_unused=True, materialize_grads=True)
        for y in (together, apart)
    ]
    for a, b in zip(*grads, strict=True):
        checks.close(a, b)


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in checks.CASES}))
@pytest.mark.parametrize("side", ["left", "right", "interior"])
def test_padding_among_documents(kind: str, side: str) -> None:
    attn, (lengths,) = checks.make(kind), [[[9, 14], [20, 3]]]
    numbers, x = documents(lengths), checks.rows(2, 23)
    t = torch.arange(23)
    valid = {"left": t >= 4, "right": t < 19, "interior": t % 5 != 2}[side].expand(2, -1)
    y = attn(x, documents=numbers, valid=valid)[0]
    assert (y[~valid] == 0).all()
    for row in range(2):
        for number in range(2):
            mine = (numbers[row] == number) & valid[row]
            if not mine.any():  # all of it is padding
                continue
            checks.close(y[row, mine], attn(x[row, mine][None])[0][0])


def test_a_state_goes_on_with_one_document() -> None:
    attn, x = checks.make("mka"), checks.rows(1, 4)
    with pytest.raises(InputError, match="a state continues one document"):
        attn(x, state=attn.initial_state(1), documents=torch.tensor([[0, 0, 1, 1]]))


@pytest.mark.parametrize(
    ("positions", "valid", "found"),
    [
        ([[0, 1, 2, 0, 1]], None, [[0, 0, 0, 1, 1]]),
        ([[0, 0, 1, 0]], None, [[0, 1, 1, 2]]),
        ([[5, 6, 4, 9]], None, [[0, 0, 1, 1]]),
        ([[0, 3, 6, 9]], None, None),
        ([[0, 0, 0, 1, 2]], [[0, 0, 1, 1, 1]], None),
        ([[1, 1, 0, 1, 2]], [[0, 0, 1, 1, 1]], None),
        ([[0, 1, 1, 1, 2]], [[1, 1, 0, 0, 1]], None),
        ([[0, 1, 7, 0, 1]], [[1, 1, 0, 1, 1]], [[0, 0, 0, 1, 1]]),
    ],
)
def test_documents_by_their_positions(
    positions: list[list[int]], valid: list[list[int]] | None, found: list[list[int]] | None
) -> None:
    numbers = documents_of(
        torch.tensor(positions), None if valid is None else torch.tensor(valid).bool()
    )
    assert (None if numbers is None else numbers.tolist()) == found


def test_rows_are_as_long_as_their_documents() -> None:
    """One of 4,000 tokens and 100 of 10 do not become 101 of 4,000."""
    numbers = documents([[4000, *[10] * 100]])
    made = list(pieces(numbers, None))
    assert sum(where.numel() for where, _ in made) == 5000
    tokens = torch.cat([where[there] for where, there in made])
    assert torch.equal(tokens.sort().values, torch.arange(5000))
    lengths = documents([[1, 2, 3, 4, 5, 6, 7, 8, 9, 100, 130]])
    assert sum(where.numel() for where, _ in pieces(lengths, None)) < 2 * lengths.numel()
