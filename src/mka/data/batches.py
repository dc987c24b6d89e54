"""Token files to batches. A batch is a pure function of (seed, step): nothing else has to be remembered."""

from collections.abc import Iterator

import numpy as np
import torch

from mka.data.tokens import TokenSplit
from mka.limits import InputError, check_at_least


class BlockBatches:
    """Training batches of T + 1 tokens, so that T of them are predicted.

    Blocks lie at a stride of T: each token after the first is predicted once, short of a rest that fills no
    block. Each epoch has its own order of the blocks; batches cut the endless sequence of epochs, so one may
    reach into the next.
    """

    def __init__(self, ids: np.ndarray, sequence_length: int, batch_size: int, seed: int) -> None:
        """`ids` (N,) integers. Raises InputError if they do not fill one block."""
        check_at_least("batch_size", batch_size, 1)
        self.num_blocks = count_blocks(ids, sequence_length)
        self.ids = ids
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    def steps_per_epoch(self, batches_per_step: int = 1) -> int:
        """Steps after which every block has been seen, at that many batches in a step."""
        return -(-self.num_blocks // (self.batch_size * batches_per_step))

    def at(self, step: int) -> torch.Tensor:
        """Batch number `step`, from 0: LongTensor (batch_size, T + 1)."""
        first = step * self.batch_size
        blocks = [self._block(position) for position in range(first, first + self.batch_size)]
        return gather(self.ids, np.array(blocks), self.sequence_length)

    def _block(self, position: int) -> int:
        epoch, within = divmod(position, self.num_blocks)
        if self._order[0] != epoch:
            self._order = (epoch, np.random.default_rng([self.seed, epoch]).permutation(self.num_blocks))
        return int(self._order[1][within])


def evaluation_batches(
    split: TokenSplit, sequence_length: int, batch_size: int, max_tokens: int | None = None
) -> Iterator[tuple[torch.Tensor, int]]:
    """Blocks of a held-out split, in order: (LongTensor (b, T + 1), UTF-8 bytes behind the b * T predicted tokens).

    Every token is predicted at most once. With `max_tokens`, only so many are predicted (one block at least), in
    blocks spread evenly over the split. The last batch may be smaller. Raises InputError if the split does not
    fill one block, and ValueError for a split without byte counts.
    """
    if split.token_bytes is None:
        raise ValueError("this split has no byte counts; evaluate on validation or test")
    check_at_least("batch_size", batch_size, 1)
    num_blocks = count_blocks(split.ids, sequence_length)
    chosen = num_blocks if max_tokens is None else min(num_blocks, max(1, max_tokens // sequence_length))
    blocks = np.arange(chosen) * num_blocks // chosen
    return (
        (gather(split.ids, some, sequence_length), covered_bytes(split.token_bytes, some, sequence_length))
        for some in (blocks[first : first + batch_size] for first in range(0, chosen, batch_size))
    )


def count_blocks(ids: np.ndarray, sequence_length: int) -> int:
    check_at_least("sequence_length", sequence_length, 1)
    if len(ids) <= sequence_length:
        needed = f"one block needs {sequence_length + 1}; use a shorter --sequence_length or more text"
        raise InputError(f"a split of the corpus has {len(ids)} tokens, {needed}")
    return (len(ids) - 1) // sequence_length


def gather(ids: np.ndarray, blocks: np.ndarray, sequence_length: int) -> torch.Tensor:
    places = blocks[:, None] * sequence_length + np.arange(sequence_length + 1)
    return torch.from_numpy(np.asarray(ids[places]).astype(np.int64))


def covered_bytes(token_bytes: np.ndarray, blocks: np.ndarray, sequence_length: int) -> int:
    places = blocks[:, None] * sequence_length + np.arange(1, sequence_length + 1)
    return int(token_bytes[places].sum(dtype=np.int64))
