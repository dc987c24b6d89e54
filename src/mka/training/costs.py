"""What a training step keeps in memory, and what to do when it does not fit."""

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
"""What each rank holds only its share of."""
ASKED = re.compile(r"allocate (\d+) bytes|allocate ([\d.]+ [KMGT]iB)")


class OutOfMemory(RuntimeError):
    """A training that does not fit; the message says what takes how much and what to try."""


@dataclass(frozen=True, kw_only=True)
class StepMemory:
    """Bytes on one rank. Weights, gradients and AdamW's two moments are float32."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @classmethod
    def of(cls, model: nn.Module, row_bytes: int, rows: int, strategy: str = "ddp", num_ranks: int = 1) -> "StepMemory":
        """`row_bytes`: activations of one row; `strategy`: a key of SHARED, or anything that shares nothing."""
        weights = FLOAT32_BYTES * sum(p.numel() for p in model.parameters())
        whole = {"weights": weights, "gradients": weights, "optimizer": 2 * weights}
        held = {name: size // num_ranks if name in SHARED.get(strategy, ()) else size for name, size in whole.items()}
        return cls(**held, activations=row_bytes * rows)


def activation_bytes(model: nn.Module, length: int, autocast: AbstractContextManager) -> int:
    """Bytes that the forward pass of one row of `length` tokens keeps for the backward pass, loss included.

    Every tensor that autograd saves is counted once; weights are not counted. Rows add up.
    """
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}
    kept: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)  # or its place could be given to another one
        return tensor

    device = next(model.parameters()).device
    tokens = torch.zeros((1, length + 1), dtype=torch.long, device=device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
        loss = next_token_loss(model, tokens)
    del loss
    return sum(sizes.values())


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's error, Python's, or the CPU allocator's, which is a plain RuntimeError."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "DefaultCPUAllocator" in str(error)


def advice(error: BaseException, memory: StepMemory, rows: int, parts: int) -> str:
    """One line: what was asked for, what takes how much, and the next smaller part that keeps the global batch."""
    found = ASKED.search(str(error))
    asked = f" (asked for {shown(int(found[1])) if found[1] else found[2]} more)" if found else ""
    sizes = (
        f"weights {shown(memory.weights)}, gradients {shown(memory.gradients)}, AdamW {shown(memory.optimizer)}, "
        f"activations {shown(memory.activations)} for {rows} row" + "s" * (rows > 1)
    )
    smaller = [size for size in range(1, rows) if rows * parts % size == 0]
    if smaller:
        flags = f"--batch_size {smaller[-1]} --gradient_accumulation_steps {rows * parts // smaller[-1]}"
        return f"out of memory{asked}: {sizes}; try {flags}, which keeps the global batch"
    return f"out of memory{asked}: {sizes}; try --gradient_checkpointing or a shorter --sequence_length"


def shown(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"
