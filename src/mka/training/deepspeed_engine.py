"""The same training with DeepSpeed's ZeRO, which shares training state among the ranks.

Stage 1 shares the optimizer state, stage 2 the gradients too, stage 3 the weights too.
DeepSpeed is imported in this file only, when it is asked for. Its own checkpoints are
pickles; ours are read and written through its accessors for whole parameters, so that a
checkpoint fits every strategy and every number of ranks.
"""

import warnings
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

import deepspeed
import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from torch.nn.functional import pad

from mka.distributed import Ranks
from mka.models import next_token_loss
from mka.training.engine import MOMENTS, Tensors, received, stored, whole
from mka.training.nonfinite import NonFiniteGradient
from mka.training.optimizer import MAX_GRAD_NORM, build_optimizer
from mka.training.precision import Precision

# The defaults of torch's GradScaler, so that float16 behaves alike in both engines.
FIRST_SCALE = 2.0**16
GROWTH_INTERVAL = 2000


class DeepSpeedEngine:
    """AdamW under DeepSpeed's ZeRO; float32 weights under autocast.

    Args:
        settings: the settings of a DeepSpeed file, without the keys that are filled in
            here.
        rows: rows per forward pass on one rank.
        accumulation: forward passes per optimizer step.
    """

    def __init__(
        self,
        model: nn.Module,
        learning_rate: float,
        precision: Precision,
        ranks: Ranks,
        settings: dict[str, Any],
        rows: int,
        accumulation: int,
    ) -> None:
        # DeepSpeed greets on the standard output, which is for the results.
        with redirect_stdout(StringIO()):
            deepspeed.init_distributed()
        model.to(ranks.device)
        ours = {
            "train_micro_batch_size_per_gpu": rows,
            "gradient_accumulation_steps": accumulation,
            "train_batch_size": rows * accumulation * ranks.count,
            "gradient_clipping": MAX_GRAD_NORM,
            "zero_allow_untested_optimizer": True,
        }
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        self.model, self.precision, self.ranks = model, precision, ranks
        self.engine: Any
        self.optimizer: Any  # ZeRO's, around the AdamW in its attribute `optimizer`
        self.engine, self.optimizer, *_ = deepspeed.initialize(
            model=model, optimizer=build_optimizer(model, learning_rate), config=settings | ours
        )
        self.make_moments()
        # If ZeRO chooses the loss scale itself under autocast, it clips the scaled
        # gradients; with a scale of ours it removes the scale first.
        self.scale, self.accepted = (FIRST_SCALE if precision.name == "float16" else 1.0), 0

    def gradients(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Add the gradients of the mean over `parts` (b, T + 1); see
        `Engine.gradients`."""
        if self.precision.name == "float16":
            self.optimizer.override_loss_scale(self.scale)
        losses = []
        for number, part in enumerate(parts, 1):
            with self.precision.autocast():
                loss = next_token_loss(self.engine, part)
            self.engine.backward(loss)
            # DeepSpeed counts parts by calls of its step; the last call, which updates,
            # is in our `step`.
            if number < len(parts):
                self.engine.step()
            losses.append(loss.detach())
        return losses

    def step(self, learning_rate: float) -> bool:
        """Clip, step and clear the gradients; see `Engine.step`."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.engine.step()
        skipped = not self.engine.was_step_applied()
        if self.precision.name == "float16":
            self.adjust_scale(skipped)
        elif skipped:
            raise NonFiniteGradient("a gradient is not finite")
        return skipped

    def adjust_scale(self, skipped: bool) -> None:
        """Halve the scale after an overflow; double it after 2,000 steps without
        one."""
        # As torch's GradScaler does, so that each engine can resume the other's
        # checkpoints.
        self.accepted = 0 if skipped else self.accepted + 1
        if skipped:
            self.scale /= 2
        elif self.accepted == GROWTH_INTERVAL:
            self.scale, self.accepted = 2 * self.scale, 0

    def state(self) -> tuple[Tensors, Tensors, dict[str, Any]]:
        """Weights, optimizer state and the rest, whole; see `Engine.state`."""
        weights, moments = {}, {}
        # ZeRO counts the steps per share; all shares have taken the same number.
        step = next(iter(self.optimizer.optimizer.state.values()))["step"]
        for name, parameter in self.model.named_parameters():
            weights[name] = on_cpu(safe_get_full_fp32_param(parameter))
            for moment in MOMENTS[1:]:
                moments[f"{name}.{moment}"] = on_cpu(
                    safe_get_full_optimizer_state(parameter, moment)
                )
            moments[f"{name}.step"] = on_cpu(step)
        # Buffers are not among the parameters.
        weights |= {
            name: whole(values)
            for name, values in stored(self.model).items()
            if name not in weights
        }
        return weights, moments, {"scaler": self.scaler_state()}

    def load(self, optimizer: Tensors, rest: dict[str, Any]) -> None:
        """Restore an optimizer state; see `Engine.load`."""
        updated = set(self.ranks.on_main(lambda: list(optimizer)))
        for name, parameter in self.model.named_parameters():
            # A parameter that never had a gradient has no state; its moments stay zero.
            if f"{name}.step" not in updated:
                continue
            step = received(optimizer, f"{name}.step", torch.Size(), self.ranks)
            # Under stage 3 a parameter is empty until it is gathered; its shape is in
            # ds_shape.
            shape = getattr(parameter, "ds_shape", parameter.shape)
            for moment in MOMENTS[1:]:
                self.put(
                    parameter, moment, received(optimizer, f"{name}.{moment}", shape, self.ranks)
                )
            for state in self.optimizer.optimizer.state.values():
                state["step"].copy_(step)
        if self.precision.name == "float16":
            self.scale, self.accepted = rest["scaler"]["scale"], rest["scaler"]["_growth_tracker"]

    def put(self, parameter: Any, moment: str, values: Tensor) -> None:
        """Keep this rank's share of a whole moment."""
        # Stages 1 and 2 leave parameters whole. The accessor for whole moments does not
        # know stage 3's padding, so there the share is cut here.
        if not hasattr(parameter, "ds_tensor"):
            safe_set_full_optimizer_state(parameter, values, moment)
            return
        size = parameter.ds_tensor.numel()
        padded = pad(values.flatten(), (0, size * self.ranks.count - values.numel()))
        safe_set_local_optimizer_state(parameter, padded[size * self.ranks.rank :][:size], moment)

    def make_moments(self) -> None:
        """Create AdamW's moments, as zeros, before the first step."""
        # AdamW would create them in its first step, group by group, but stages 1 and 2
        # look for those of all groups after the first group's.
        zero = self.optimizer
        if hasattr(zero, "fp32_partitioned_groups_flat"):
            shares = zero.fp32_partitioned_groups_flat
        else:
            shares = zero.single_partition_of_fp32_groups
        for share in shares:
            moments = {name: torch.zeros_like(share, requires_grad=False) for name in MOMENTS[1:]}
            zero.optimizer.state[share] = {"step": torch.zeros((), device=share.device), **moments}
        # Stages 1 and 2 link parameters to their moments only once, when this is
        # called.
        if hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
            zero._lazy_init_hp_params_optimizer_state()

    def scaler_state(self) -> dict[str, Any]:
        """The loss scale in the format of torch's GradScaler, which can resume from
        it."""
        if self.precision.name != "float16":
            return {}
        scaler = torch.amp.GradScaler(self.ranks.device.type).state_dict()
        return scaler | {"scale": self.scale, "_growth_tracker": self.accepted}


def on_cpu(values: Any) -> Tensor:
    """A copy in host memory, which later steps do not change."""
    return values.detach().cpu().clone()
