"""The training loop: batches -> loss -> step, for a number of steps, on one device."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mka.models import next_token_loss
from mka.results import CurvePoint
from mka.training.optimizer import MAX_GRAD_NORM, build_optimizer, build_schedule
from mka.training.precision import Precision

LOOKS = 6
"""Held-out looks during training, the first before it and the last after it."""
LOGGED_POINTS = 500
"""Longest loss curve; longer runs log means of several steps."""


class NonFiniteLoss(RuntimeError):
    """The loss was NaN or infinite; the optimiser has not stepped on it."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """`batch_at(step)` gives the blocks (B, T + 1) of an optimiser step, taken in `accumulation` equal parts."""

    batch_at: Callable[[int], Tensor]
    tokens_per_step: int
    steps: int
    accumulation: int
    learning_rate: float
    precision: Precision
    device: torch.device


@dataclass
class TrainingRun:
    """What training leaves: losses (nats per token) of every step, a curve, seconds without evaluation."""

    losses: list[float] = field(default_factory=list)
    curve: list[CurvePoint] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    skipped_steps: int = 0

    @property
    def final_loss(self) -> float:
        """Mean loss of the last tenth of the steps."""
        last = self.losses[-max(1, len(self.losses) // 10) :]
        return sum(last) / len(last)


def train(
    model: nn.Module,
    plan: TrainingPlan,
    look: Callable[[], float],
    on_step: Callable[[TrainingRun], None] = lambda run: None,
) -> TrainingRun:
    """Train `model` in place. `look()` gives a held-out loss; its time is not counted.

    Raises NonFiniteLoss, naming the step, before such a loss reaches the weights.
    """
    optimizer = build_optimizer(model, plan.learning_rate)
    schedule = build_schedule(optimizer, plan.steps)
    scaler = plan.precision.scaler()
    looks = {round(plan.steps * i / (LOOKS - 1)) for i in range(LOOKS)}
    log_every = max(1, plan.steps // LOGGED_POINTS)
    run = TrainingRun()
    untrained = check_finite(look(), "the held-out loss before training")
    run.curve.append(CurvePoint(step=0, tokens=0, seconds=0.0, train_loss=None, eval_loss=untrained))
    model.train()
    for step in range(plan.steps):
        started = time.perf_counter()
        loss = accumulate(model, plan, step, scaler)
        step_optimizer(model, optimizer, scaler, run)
        schedule.step()
        if plan.device.type == "cuda":
            torch.cuda.synchronize(plan.device)
        run.losses.append(loss)
        run.seconds += time.perf_counter() - started
        run.tokens += plan.tokens_per_step
        if (step + 1) % log_every == 0 or step + 1 in looks:
            held_out = check_finite(look(), f"the held-out loss after step {step + 1}") if step + 1 in looks else None
            run.curve.append(curve_point(run, log_every, held_out))
            model.train()
        on_step(run)
    return run


def accumulate(model: nn.Module, plan: TrainingPlan, step: int, scaler: torch.amp.GradScaler) -> float:
    """Gradients of one optimiser step; returns its mean loss over tokens."""
    parts = plan.batch_at(step).to(plan.device).chunk(plan.accumulation)
    total = 0.0
    for part in parts:
        with plan.precision.autocast():
            loss = next_token_loss(model, part) / len(parts)
        total += check_finite(loss.item(), f"the loss at step {step + 1}")
        scaler.scale(loss).backward()
    return total


def check_finite(loss: float, what: str) -> float:
    """The loss itself; raises NonFiniteLoss, naming it, if it is NaN or infinite."""
    if not math.isfinite(loss):
        raise NonFiniteLoss(f"{what} is {loss}; try a lower --learning_rate")
    return loss


def step_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, run: TrainingRun
) -> None:
    """Clip and step; a float16 step whose gradients overflowed is skipped and counted."""
    scale = scaler.get_scale()
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
    scaler.step(optimizer)
    scaler.update()
    run.skipped_steps += scaler.get_scale() < scale
    optimizer.zero_grad(set_to_none=True)


def curve_point(run: TrainingRun, log_every: int, eval_loss: float | None) -> CurvePoint:
    recent = run.losses[-log_every:]
    return CurvePoint(
        step=len(run.losses),
        tokens=run.tokens,
        seconds=run.seconds,
        train_loss=sum(recent) / len(recent),
        eval_loss=eval_loss,
    )
