"""The training loop: batches -> loss -> step, for a number of steps, on any number of ranks, from where it stood."""

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from signal import SIGINT, SIGTERM
from typing import Any

import torch
from torch import Tensor, nn

from mka.distributed import Ranks, lost_ranks_said
from mka.models import next_token_loss
from mka.results import CurvePoint
from mka.training.checkpoint import Checkpoint, Checkpoints
from mka.training.engine import Engine, Objective, TorchEngine, stored
from mka.training.interruption import Interrupted, StopRequest, stop_request
from mka.training.nonfinite import NonFiniteGradient, NonFiniteLoss, explain
from mka.training.optimizer import RateOf, learning_rate_at
from mka.training.precision import Precision

LOOKS = 6
"""Held-out looks during training, the first before it and the last after it."""
LOGGED_POINTS = 500
"""Longest loss curve; longer runs log means of several steps."""
ADVICE = "try a lower --learning_rate"


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """`batch_at(step)` gives the blocks (B, T + 1) of an optimiser step; each of the ranks takes an equal share of
    them, in `accumulation` equal parts. `save_steps` 0: no checkpoint but at the end and at a signal. `deepspeed`: the
    settings of DeepSpeed's engine, which then takes the place of `strategy`. `objective` and `rate_of`, the loss and
    the learning rates of parameters against each other, are not for DeepSpeed."""

    batch_at: Callable[[int], Tensor]
    steps: int
    accumulation: int
    learning_rate: float
    precision: Precision
    ranks: Ranks = field(default_factory=Ranks)
    save_steps: int = 0
    strategy: str = "ddp"
    deepspeed: dict[str, Any] | None = None
    objective: Objective = next_token_loss
    rate_of: RateOf = lambda name: 1.0

    def parts_at(self, step: int) -> tuple[Tensor, ...]:
        """This rank's rows of a step, `accumulation` times (b, T + 1)."""
        shares = self.batch_at(step).chunk(self.ranks.count)
        return shares[self.ranks.rank].to(self.ranks.device).chunk(self.accumulation)


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
    checkpoints: Checkpoints | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> TrainingRun:
    """Train `model` in place, from its newest checkpoint if there is one. `look()` gives a held-out loss; its time is
    not counted. Collective.

    Raises NonFiniteLoss, naming step and layer, before such a loss reaches the weights; Interrupted after a signal,
    when the checkpoint is written; RankLost if another rank is.
    """
    looks = {round(plan.steps * i / (LOOKS - 1)) for i in range(LOOKS)}
    log_every = max(1, plan.steps // LOGGED_POINTS)
    model.to(plan.ranks.device)
    engine, run = resume(model, plan, checkpoints, say)
    saved = len(run.losses)
    if not run.curve:
        untrained = check_finite(look(), "the held-out loss before training")
        run.curve.append(CurvePoint(step=0, tokens=0, seconds=0.0, train_loss=None, eval_loss=untrained))
    model.train()
    with stop_request() as request:
        for step in range(len(run.losses), plan.steps):
            with lost_ranks_said(f"at step {step + 1}"):
                stop = take_step(model, engine, plan, step, run, request)
                done = step + 1
                if done % log_every == 0 or done in looks:
                    held_out = check_finite(look(), f"the held-out loss after step {done}") if done in looks else None
                    run.curve.append(curve_point(run, log_every, held_out))
                    model.train()
                on_step(run)
                due = done == plan.steps or (plan.save_steps and done % plan.save_steps == 0)
                if checkpoints is not None and (stop or due) and done > saved:
                    save(engine, plan, checkpoints, run)
                    saved = done
            if stop:
                raise Interrupted(stop, f"after step {done} of {plan.steps}")
        # One that came after the last step's exchange.
        late = signal_of(*plan.ranks.sum((request.got(SIGTERM), request.got(SIGINT))))
        if late:
            raise Interrupted(late, f"after step {plan.steps} of {plan.steps}")
    return run


def signal_of(terminated: float, interrupted: float) -> int:
    """On which signal to stop, given how many ranks got each; or 0."""
    return SIGTERM if terminated else SIGINT if interrupted else 0


def make_engine(model: nn.Module, plan: TrainingPlan) -> Engine:
    if plan.deepspeed is None:
        return TorchEngine(
            model, plan.learning_rate, plan.precision, plan.ranks, plan.strategy, plan.objective, plan.rate_of
        )
    if plan.ranks.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or it warns, on every rank, that it had to guess
    from mka.training.deepspeed_engine import DeepSpeedEngine

    rows = len(plan.parts_at(0)[0])
    return DeepSpeedEngine(
        model, plan.learning_rate, plan.precision, plan.ranks, plan.deepspeed, rows, plan.accumulation
    )


def take_step(
    model: nn.Module, engine: Engine, plan: TrainingPlan, step: int, run: TrainingRun, request: StopRequest
) -> int:
    """One optimiser step on all ranks; returns the signal on which to stop, or 0. Its loss is the mean over tokens."""
    started = time.perf_counter()
    parts = plan.parts_at(step)
    losses = engine.gradients(parts)
    mine = torch.stack(losses).double().mean().item()
    # One exchange a step: the ranks agree on the loss, and on whether to stop.
    total, terminated, interrupted = plan.ranks.sum((mine, request.got(SIGTERM), request.got(SIGINT)))
    loss = total / plan.ranks.count
    if not math.isfinite(loss):
        layer = explain(model, parts, losses, plan.precision.autocast(), plan.ranks)
        raise NonFiniteLoss(f"the loss at step {step + 1} is {loss}; {layer}; {ADVICE}")
    try:
        run.skipped_steps += engine.step(learning_rate_at(step, plan.steps, plan.learning_rate))
    except NonFiniteGradient as error:
        raise NonFiniteLoss(f"at step {step + 1} {error}, the loss is {loss:.4g}; {ADVICE}") from None
    if plan.ranks.device.type == "cuda":
        torch.cuda.synchronize(plan.ranks.device)
    run.losses.append(loss)
    run.seconds += time.perf_counter() - started
    run.tokens += plan.ranks.count * sum(part[:, 1:].numel() for part in parts)
    return signal_of(terminated, interrupted)


def check_finite(loss: float, what: str) -> float:
    """The loss itself; raises NonFiniteLoss, naming it, if it is NaN or infinite."""
    if not math.isfinite(loss):
        raise NonFiniteLoss(f"{what} is {loss}; {ADVICE}")
    return loss


def save(engine: Engine, plan: TrainingPlan, checkpoints: Checkpoints, run: TrainingRun) -> None:
    """Collective; the first rank writes."""
    weights, optimizer, rest = engine.state()
    if plan.ranks.is_main:
        checkpoints.save(Checkpoint(len(run.losses), weights, optimizer, {"run": asdict(run), "engine": rest}))


def resume(
    model: nn.Module,
    plan: TrainingPlan,
    checkpoints: Checkpoints | None,
    say: Callable[[str], None],
) -> tuple[Engine, TrainingRun]:
    """An engine and what is done: nothing, or as in the newest whole checkpoint, which the first rank reads."""
    found: list[Checkpoint] = []

    def read() -> dict[str, Any] | None:
        checkpoint = checkpoints.newest(say) if checkpoints is not None else None
        if checkpoint is None:
            return None
        found.append(checkpoint)
        say(f"Going on after step {checkpoint.step} of {plan.steps}")
        return checkpoint.progress

    progress = plan.ranks.on_main(read)
    if progress is None:
        return make_engine(model, plan), TrainingRun()
    with torch.no_grad():
        for name, values in stored(model).items():
            if found:
                values.copy_(found[0].weights[name])
            plan.ranks.broadcast(values)
    engine = make_engine(model, plan)
    engine.load(found[0].optimizer if found else {}, progress["engine"])
    run = progress["run"]
    return engine, TrainingRun(**run | {"curve": [CurvePoint(**point) for point in run["curve"]]})


def curve_point(run: TrainingRun, log_every: int, eval_loss: float | None) -> CurvePoint:
    recent = run.losses[-log_every:]
    return CurvePoint(
        step=len(run.losses),
        tokens=run.tokens,
        seconds=run.seconds,
        train_loss=sum(recent) / len(recent),
        eval_loss=eval_loss,
    )
