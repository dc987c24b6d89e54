"""States as they are after a long context, filled with random numbers."""

import torch

from mka.memory.entry import store
from mka.memory.state import State

ROOM = 64
"""Entries that can be added before a store grows."""


def fill(state: State, context: int) -> State:
    """Fill a new state as if `context` tokens had been read; returns the same state."""
    # Reading a million tokens would take hours; for times and sizes the values do not matter.
    for name, entry in state.entries.items():
        held, limit = context // entry.every, state.limit(name)
        room = held + ROOM if limit is None else min(held + ROOM, limit)
        rows = state.batch_size
        room += 0 if limit is None else entry.first
        state.tensors[name] = store(rows, room, entry.shape, entry.dtype, state.device)
        if entry.dtype.is_floating_point:
            state.tensors[name].normal_()
        else:
            # Integers are the positions at which chunks begin.
            state.tensors[name][:] = (
                entry.every * torch.arange(room, device=state.device)[None, :, None]
            )
    state.past, state.lengths, state.furthest = ([context] * state.batch_size for _ in range(3))
    return state
