"""From the rows of one step to new weights: one process, DDP, or FSDP2.

Each rank takes its own rows in equal parts, and the gradients are averaged over parts
and ranks, so that the same rows give the same step however they are distributed.
DeepSpeed's engine, with the same interface, is in deepspeed_engine.py.
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
"""AdamW's state per parameter; `step`, the number of updates, is a scalar."""


class Engine(Protocol):
    """What the training loop needs from a strategy. Every method is collective."""

    def gradients(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Add the gradients of the mean loss over `parts`, each (b, T + 1).

        Returns the loss of each part, a scalar.
        """
        ...

    def step(self, learning_rate: float) -> bool:
        """Clip the gradients, step, and clear them.

        Returns True if float16 gradients overflowed and the step was skipped. In any
        other precision raises NonFiniteGradient, before the step, if a gradient is not
        finite: clipping would spread it over all weights.
        """
        ...

    def state(self) -> tuple[Tensors, Tensors, dict[str, Any]]:
        """Weights, optimizer state by parameter name, and a JSON-able rest; whole on
        each rank."""
        ...

    def load(self, optimizer: Tensors, rest: dict[str, Any]) -> None:
        """Restore such an optimizer state, which only the first rank has; all have
        `rest`."""
        ...


class TorchEngine:
    """AdamW in one process, with DDP, or with FSDP2; float32 weights under autocast."""

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
        self.model, self.precision, self.ranks, self.objective = (
            model.to(ranks.device),
            precision,
            ranks,
            objective,
        )
        self.scaler = precision.scaler()
        self.wrapped: nn.Module | None = model
        if ranks.accelerator is not None and ranks.count > 1:
            # FSDP must wrap before the optimizer sees the parameters; DDP needs the
            # first rows.
            self.wrapped = fully_sharded(model, precision) if strategy == "fsdp" else None
        self.optimizer = build_optimizer(model, learning_rate, rate_of)

    def gradients(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Add the gradients of the mean over `parts` (b, T + 1); see
        `Engine.gradients`."""
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
        """The model in DDP, which is told whether some parameters get no gradient.

        row: (1, T + 1), a row as long as those to train on.
        """
        # Rows that are no longer than the window leave nothing to retrieve, so that the
        # parameters of retrieval are unused. DDP would wait for their gradients;
        # looking for unused ones in every step costs time, so it is only asked to if
        # one pass shows that there are any.
        with self.precision.autocast():
            loss = self.objective(self.model, row)
        loss.backward()
        unused = any(p.grad is None for p in self.model.parameters())
        self.optimizer.zero_grad(set_to_none=True)
        accelerator: Any = self.ranks.accelerator
        accelerator.ddp_handler = DistributedDataParallelKwargs(find_unused_parameters=unused)
        return accelerator.prepare_model(self.model)

    def exchange(self, now: bool) -> AbstractContextManager:
        """A context for one part's backward pass; ranks exchange gradients only if
        `now`."""
        # Once per step, with the last part, the sum over all parts is exchanged. FSDP2
        # has a switch for it instead of a context.
        if isinstance(self.wrapped, FSDPModule):
            self.wrapped.set_requires_gradient_sync(now)
        elif self.ranks.accelerator is not None and not now:
            return self.ranks.accelerator.no_sync(self.wrapped)
        return nullcontext()

    def step(self, learning_rate: float) -> bool:
        """Clip, step and clear the gradients; see `Engine.step`."""
        set_learning_rate(self.optimizer, learning_rate)
        scale = self.scaler.get_scale()
        # Clipping needs the true norm, without the loss scale.
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
        if not self.scaler.is_enabled() and not whole(norm).isfinite():
            raise NonFiniteGradient("a gradient is not finite")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        # The scaler does not say that it skipped a step; it only lowers its scale then.
        return self.scaler.get_scale() < scale

    def state(self) -> tuple[Tensors, Tensors, dict[str, Any]]:
        """Weights, optimizer state and the rest, whole; see `Engine.state`."""
        weights = {name: whole(values) for name, values in stored(self.model).items()}
        moments = {
            f"{name}.{moment}": whole(values)
            for name, parameter in self.model.named_parameters()
            for moment, values in self.optimizer.state[parameter].items()
        }
        return weights, moments, {"scaler": self.scaler.state_dict()}

    def load(self, optimizer: Tensors, rest: dict[str, Any]) -> None:
        """Restore an optimizer state; see `Engine.load`."""
        # All ranks need the list of names, because each tensor is a broadcast of its
        # own.
        updated = set(self.ranks.on_main(lambda: list(optimizer)))
        for name, parameter in self.model.named_parameters():
            # A parameter that never had a gradient has no state.
            if f"{name}.step" not in updated:
                continue
            for moment in MOMENTS:
                shape = parameter.shape if moment != "step" else torch.Size()
                values = received(optimizer, f"{name}.{moment}", shape, self.ranks)
                if isinstance(parameter, DTensor) and moment != "step":
                    values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
                self.optimizer.state[parameter][moment] = values
        self.scaler.load_state_dict(rest["scaler"])


def whole(values: Tensor) -> Tensor:
    """The whole of a tensor, in host memory; each rank may hold a part of it.
    Collective."""
    return (values.full_tensor() if isinstance(values, DTensor) else values).detach().cpu()


def received(tensors: Tensors, name: str, shape: torch.Size, ranks: Ranks) -> Tensor:
    """A tensor of the first rank, on this rank's device; `shape` and float32 fit it.
    Collective."""
    values = tensors[name] if ranks.is_main else torch.empty(shape)
    values = values.to(ranks.device)
    ranks.broadcast(values)
    return values


def stored(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds of a model: its trained parameters and its persistent
    buffers."""
    # named_parameters gives a tied parameter once, under its first name; state_dict
    # knows which buffers are persistent.
    lasting = model.state_dict(keep_vars=True)
    trained = [(name, values) for name, values in model.named_parameters() if values.requires_grad]
    named = [*trained, *model.named_buffers()]
    return {name: values for name, values in named if name in lasting}


def fully_sharded(model: Any, precision: Precision) -> nn.Module:
    """The model under FSDP2, with one unit per block; gradients are reduced in float32.

    Under mixed precision the MLPs are gathered in low precision; norms, decays, routers
    and embeddings stay in float32.
    """
    # The MLP's output is a view; GPT-2 adds it to the stream out of place, as the
    # warning asks.
    warnings.filterwarnings(
        "ignore", r"FSDP2-wrapped module \(\w+\) returned a view tensor", UserWarning
    )
    float32 = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    for block in model.transformer.h:
        # Autocast would cast the MLP's weights anyway, so gathering them cast costs no
        # precision.
        if precision.name != "float32":
            dtype = getattr(torch, precision.name)
            low = MixedPrecisionPolicy(
                param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
            fully_shard(block.mlp, mp_policy=low)
        fully_shard(block, mp_policy=float32)
    return fully_shard(model, mp_policy=float32)
