"""What a training step holds in memory, and what to do when it does not fit."""

import re
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mka.models import next_token_loss

FLOAT32_BYTES = 4
SHARED = {
    "fsdp": ("weights", "gradients", "optimizer"),
    "zero3": ("weights", "gradients", "optimizer"),
    "zero2": ("gradients", "optimizer"),
    "zero1": ("optimizer",),
}
"""By strategy, what is divided among the ranks."""
# The messages of the CPU's allocator and of CUDA's.
ASKED = re.compile(r"allocate (\d+) bytes|allocate ([\d.]+ [KMGT]iB)")


class OutOfMemory(RuntimeError):
    """A training does not fit; the message says what needs how much memory and what to
    try."""


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes of a training step on one rank; `optimizer` is AdamW's two moments."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @classmethod
    def of(
        cls, model: nn.Module, row_bytes: int, rows: int, strategy: str = "ddp", num_ranks: int = 1
    ) -> "StepMemory":
        """The memory of a step with `rows` rows per forward pass.

        row_bytes: activations of one row. strategy: a key of SHARED; others share
            nothing.
        """
        # All in float32: autocast casts copies, which count as activations.
        weights = FLOAT32_BYTES * sum(p.numel() for p in model.parameters())
        whole = {"weights": weights, "gradients": weights, "optimizer": 2 * weights}
        held = {
            name: size // num_ranks if name in SHARED.get(strategy, ()) else size
            for name, size in whole.items()
        }
        return cls(**held, activations=row_bytes * rows)


def activation_bytes(model: nn.Module, length: int, autocast: AbstractContextManager) -> int:
    """Bytes that the forward pass of one row keeps for the backward pass, including the
    loss.

    length: tokens in the row. Weights are not counted; n rows take n times as much.
    """
    # By storage, because autograd saves several views of one tensor.
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        """Count a tensor that autograd saves."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            # Held until the end, or its address could be given to another tensor.
            kept.append(tensor)
        return tensor

    device = next(model.parameters()).device
    tokens = torch.zeros((1, length + 1), dtype=torch.long, device=device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        loss = next_token_loss(model, tokens)
    del loss
    return sum(sizes.values())


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out, on the GPU or on the CPU."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # The CPU's allocator raises a plain RuntimeError.
    return "DefaultCPUAllocator" in str(error)


def advice(error: BaseException, memory: StepMemory, rows: int, parts: int) -> str:
    """One line for a step that ran out of memory: what needs how much, and what to try.

    rows, parts: rows per forward pass, and forward passes per step, on one rank.
    """
    found = ASKED.search(str(error))
    asked = f" (asked for {shown(int(found[1])) if found[1] else found[2]} more)" if found else ""
    sizes = (
        f"weights {shown(memory.weights)}, gradients {shown(memory.gradients)}, "
        f"AdamW {shown(memory.optimizer)}, "
        f"activations {shown(memory.activations)} for {rows} row" + "s" * (rows > 1)
    )
    # The largest smaller number of rows with which whole parts make the same global
    # batch.
    smaller = [size for size in range(1, rows) if rows * parts % size == 0]
    if smaller:
        flags = (
            f"--batch_size {smaller[-1]} --gradient_accumulation_steps "
            f"{rows * parts // smaller[-1]}"
        )
        return f"out of memory{asked}: {sizes}; try {flags}, which keeps the global batch"
    return (
        f"out of memory{asked}: {sizes}; try --gradient_checkpointing or a shorter "
        "--sequence_length"
    )


def shown(size: int) -> str:
    """A number of bytes, written in MiB or, from 1 GiB on, in GiB."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
