"""From the rows of one step to new weights: one process, DDP, or FSDP2.

Every rank takes its own rows in equal parts and the gradients are averaged over parts and ranks, so that the same rows
give the same step however they are spread. DeepSpeed's engine, under the same interface, is in deepspeed_engine.py.
"""

import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from accelerate.utils import DistributedDataParallelKwargs
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from mka.distributed import Ranks
from mka.models import next_token_loss
from mka.training.nonfinite import NonFiniteGradient
from mka.training.optimizer import MAX_GRAD_NORM, RateOf, build_optimizer, set_learning_rate
from mka.training.precision import Precision

Tensors = dict[str, Tensor]
Objective = Callable[[nn.Module, Tensor], Tensor]
"""The loss, a scalar, of a model on tokens (b, T + 1)."""
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What AdamW remembers of a parameter; `step`, its count of updates, is a scalar."""


class Engine(Protocol):
    """What the loop asks of a strategy. Every method is collective."""

    def gradients(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Add the gradients of the mean over `parts` (b, T + 1); returns the loss of each part, a scalar each."""
        ...

    def step(self, learning_rate: float) -> bool:
        """Clip, step and clear the gradients; True if float16's gradients overflowed and the step was skipped.

        Raises NonFiniteGradient, before the step, if a gradient is not finite in another precision: clipping would
        spread it over all weights.
        """
        ...

    def state(self) -> tuple[Tensors, Tensors, dict[str, Any]]:
        """Weights, optimiser state by parameter name and JSON-able rest, whole, on every rank."""
        ...

    def load(self, optimizer: Tensors, rest: dict[str, Any]) -> None:
        """Take up such an optimiser state, which the first rank has; `rest` is given on all."""
        ...


class TorchEngine:
    """AdamW over one process, DDP or FSDP2 (fully_shard for each block); float32 weights under autocast."""

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float,
        precision: Precision,
        ranks: Ranks,
        strategy: str = "ddp",
        objective: Objective = next_token_loss,
        rate_of: RateOf = lambda name: 1.0,
    ) -> None:
        self.model, self.precision, self.ranks, self.objective = model.to(ranks.device), precision, ranks, objective
        self.scaler = precision.scaler()
        self.wrapped: nn.Module | None = model
        if ranks.accelerator is not None and ranks.count > 1:
            # DDP waits for the first rows.
            self.wrapped = fully_sharded(model, precision) if strategy == "fsdp" else None
        self.optimizer = build_optimizer(model, learning_rate, rate_of)

    def gradients(self, parts: Sequence[Tensor]) -> list[Tensor]:
        wrapped = self.wrapped = self.wrapped or self.replicated(parts[0][:1])
        losses = []
        for number, part in enumerate(parts, 1):
            with self.exchange(number == len(parts)):
                with self.precision.autocast():
                    loss = self.objective(wrapped, part)
                self.scaler.scale(loss / len(parts)).backward()
            losses.append(loss.detach())
        return losses

    def replicated(self, row: Tensor) -> nn.Module:
        """DDP, told whether some parameters have no gradient: rows no longer than the window leave nothing to retrieve,
        so that what retrieval learns is not used."""
        with self.precision.autocast():
            loss = self.objective(self.model, row)
        loss.backward()
        unused = any(p.grad is None for p in self.model.parameters())
        self.optimizer.zero_grad(set_to_none=True)
        accelerator: Any = self.ranks.accelerator
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=unused)
        return accelerator.prepare_model(self.model)

    def exchange(self, now: bool) -> AbstractContextManager:
        """Gradients cross to the other ranks once a step, with the last part."""
        if isinstance(self.wrapped, FSDPModule):
            self.wrapped.set_requires_gradient_sync(now)
        elif self.ranks.accelerator is not None and not now:
            return self.ranks.accelerator.no_sync(self.wrapped)
        return nullcontext()

    def step(self, learning_rate: float) -> bool:
        set_learning_rate(self.optimizer, learning_rate)
        scale = self.scaler.get_scale()
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        if not self.scaler.is_enabled() and not whole(norm).isfinite():
            raise NonFiniteGradient("a gradient is not finite")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return self.scaler.get_scale() < scale

    def state(self) -> tuple[Tensors, Tensors, dict[str, Any]]:
        weights = {name: whole(values) for name, values in stored(self.model).items()}
        moments = {
            f"{name}.{moment}": whole(values)
            for name, parameter in self.model.named_parameters()
            for moment, values in self.optimizer.state[parameter].items()
        }
        return weights, moments, {"scaler": self.scaler.state_dict()}

    def load(self, optimizer: Tensors, rest: dict[str, Any]) -> None:
        updated = set(self.ranks.on_main(lambda: list(optimizer)))
        for name, parameter in self.model.named_parameters():
            if f"{name}.step" not in updated:
                continue  # it never had a gradient
            for moment in MOMENTS:
                shape = parameter.shape if moment != "step" else torch.Size()
                values = received(optimizer, f"{name}.{moment}", shape, self.ranks)
                if isinstance(parameter, DTensor) and moment != "step":
                    values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
                self.optimizer.state[parameter][moment] = values
        self.scaler.load_state_dict(rest["scaler"])


def whole(values: Tensor) -> Tensor:
    """All of a tensor of which each rank may hold a part. Collective."""
    return (values.full_tensor() if isinstance(values, DTensor) else values).detach().cpu()


def received(tensors: Tensors, name: str, shape: torch.Size, ranks: Ranks) -> Tensor:
    """One of the first rank's tensors, float32, on this rank's device. Collective."""
    values = tensors[name] if ranks.is_main else torch.empty(shape)
    values = values.to(ranks.device)
    ranks.broadcast(values)
    return values


def stored(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a model: each parameter that is trained, once, under its first name, and the buffers
    that last."""
    lasting = model.state_dict(keep_vars=True)
    trained = [(name, values) for name, values in model.named_parameters() if values.requires_grad]
    named = [*trained, *model.named_buffers()]
    return {name: values for name, values in named if name in lasting}


def fully_sharded(model: Any, precision: Precision) -> nn.Module:
    """FSDP2, a unit for each block. Under mixed precision the MLPs, whose weights autocast would cast anyway, are
    gathered in low precision; norms, decays, routers and embeddings stay in float32, and so does every reduction."""
    # The MLP's output is a view; GPT-2 adds it to the stream out of place, as the warning asks.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(\w+\) returned a view tensor", UserWarning)
    float32 = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for block in model.transformer.h:
        if precision.name != "float32":
            dtype = getattr(torch, precision.name)
            low = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
            fully_shard(block.mlp, mp_policy=low)
        fully_shard(block, mp_policy=float32)
    return fully_shard(model, mp_policy=float32)
