"""States as they stand after a long context, filled with random numbers."""

import torch

from mka.memory.entry import store
from mka.memory.state import State

ROOM = 64
"""Entries that can be added before a store grows."""


def fill(state: State, context: int) -> State:
    for name, entry in state.entries.items():
        held, limit = context // entry.every, state.limit(name)
        room = held + ROOM if limit is None else min(held + ROOM, limit)
        rows = state.batch_size
        room += 0 if limit is None else entry.first
        state.tensors[name] = store(rows, room, entry.shape, entry.dtype, state.device)
        if entry.dtype.is_floating_point:
            state.tensors[name].normal_()
        else:  # where chunks begin
            state.tensors[name][:] = entry.every * torch.arange(room, device=state.device)[None, :, None]
    state.past, state.lengths, state.furthest = ([context] * state.batch_size for _ in range(3))
    return state
