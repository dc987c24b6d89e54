"""Token files to batches. A batch depends on (seed, step) alone, so a training that
resumes needs nothing else."""

from collections.abc import Iterator

import numpy as np
import torch

from mka.data.tokens import TokenSplit
from mka.errors import InputError, check_at_least


class BlockBatches:
    """Training batches of blocks of T + 1 tokens, of which T are predicted.

    Blocks begin at multiples of T, so that each token after the first is predicted once
    per epoch, except for a rest that fills no block. Each epoch has its own random
    order of blocks. Batches are cut from the endless sequence of epochs, so one may
    reach into the next.

    Args:
        ids: (N,) integers, the token ids.
        sequence_length: T.
        batch_size: blocks per batch.
        seed: random seed for the order of blocks.

    Raises InputError for sizes below 1, and if the ids do not fill one block.
    """

    def __init__(self, ids: np.ndarray, sequence_length: int, batch_size: int, seed: int) -> None:
        check_at_least("batch_size", batch_size, 1)
        self.num_blocks = count_blocks(ids, sequence_length)
        self.ids = ids
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        # The order of the epoch that was asked for last; another one is drawn when it
        # is needed.
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def at(self, step: int) -> torch.Tensor:
        """Batch number `step`, from 0: LongTensor (batch_size, T + 1)."""
        first = step * self.batch_size
        blocks = [self._block(position) for position in range(first, first + self.batch_size)]
        return gather(self.ids, np.array(blocks), self.sequence_length)

    def _block(self, position: int) -> int:
        epoch, within = divmod(position, self.num_blocks)
        if self._order[0] != epoch:
            self._order = (
                epoch,
                np.random.default_rng([self.seed, epoch]).permutation(self.num_blocks),
            )
        return int(self._order[1][within])


def evaluation_batches(
    split: TokenSplit, sequence_length: int, batch_size: int, max_tokens: int | None = None
) -> Iterator[tuple[torch.Tensor, int]]:
    """Blocks of a held-out split, in order.

    Args:
        split: validation or test.
        sequence_length: T, predictions per block.
        batch_size: blocks per batch; the last batch may be smaller.
        max_tokens: how many tokens are predicted at most, but one block at least, in
            blocks spread evenly over the split. Default: None, the whole split.

    Yields (LongTensor (b, T + 1), UTF-8 bytes of the b * T tokens that are predicted).
    Every token is predicted at most once.

    Raises InputError if the split does not fill one block, and ValueError for a split
    without byte counts.
    """
    if split.token_bytes is None:
        raise ValueError("this split has no byte counts; evaluate on validation or test")
    check_at_least("batch_size", batch_size, 1)
    num_blocks = count_blocks(split.ids, sequence_length)
    chosen = (
        num_blocks if max_tokens is None else min(num_blocks, max(1, max_tokens // sequence_length))
    )
    # The same blocks for every model, from all parts of the split.
    blocks = np.arange(chosen) * num_blocks // chosen
    ids, token_bytes = split.ids, split.token_bytes

    def batches() -> Iterator[tuple[torch.Tensor, int]]:
        """The batches of the chosen blocks."""
        for first in range(0, chosen, batch_size):
            some = blocks[first : first + batch_size]
            size = covered_bytes(token_bytes, some, sequence_length)
            yield gather(ids, some, sequence_length), size

    # The generator is inside, so that mistakes are raised here and not at the first
    # batch.
    return batches()


def count_blocks(ids: np.ndarray, sequence_length: int) -> int:
    """How many blocks of `sequence_length` predictions ids (N,) hold. Raises InputError
    if they do not fill one."""
    check_at_least("sequence_length", sequence_length, 1)
    if len(ids) <= sequence_length:
        needed = (
            f"one block needs {sequence_length + 1}; use a shorter --sequence_length or more text"
        )
        raise InputError(f"a split of the corpus has {len(ids)} tokens, {needed}")
    # Neighboring blocks share a token: the last of one is the first of the next.
    return (len(ids) - 1) // sequence_length


def gather(ids: np.ndarray, blocks: np.ndarray, sequence_length: int) -> torch.Tensor:
    """The tokens of the N blocks of these numbers, (N, sequence_length + 1) int64."""
    places = blocks[:, None] * sequence_length + np.arange(sequence_length + 1)
    # Of a memory map only these tokens are read.
    return torch.from_numpy(np.asarray(ids[places]).astype(np.int64))


def covered_bytes(token_bytes: np.ndarray, blocks: np.ndarray, sequence_length: int) -> int:
    """UTF-8 bytes of the tokens that these blocks (N,) predict, which are all but their
    first."""
    places = blocks[:, None] * sequence_length + np.arange(1, sequence_length + 1)
    # The stored counts are 32 bits wide; a sum of many would overflow.
    return int(token_bytes[places].sum(dtype=np.int64))
