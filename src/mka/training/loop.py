"""The training loop: batches -> loss -> step, on any number of ranks, from its last
checkpoint."""

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
from mka.record.results import CurvePoint
from mka.training.checkpoint import Checkpoint, Checkpoints
from mka.training.engine import Engine, Objective, TorchEngine, stored
from mka.training.interruption import Interrupted, StopRequest, stop_request
from mka.training.nonfinite import NonFiniteGradient, NonFiniteLoss, explain
from mka.training.optimizer import RateOf, learning_rate_at
from mka.training.precision import Precision

LOOKS = 6
"""How often the held-out loss is measured, the first time before training, the last
after it."""
LOGGED_POINTS = 500
"""About how many points a curve has; longer runs log means of several steps."""
ADVICE = "try a lower --learning_rate"


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How to train.

    Attributes:
        batch_at: gives the rows (B, T + 1) of an optimizer step, counted from 0. Each
            rank takes an equal share of them.
        steps: optimizer steps.
        accumulation: the number of equal parts in which a rank takes its share.
        learning_rate: the peak of the schedule.
        precision: what autocast computes in.
        ranks: the processes that train together; by default this one alone.
        save_steps: steps between checkpoints; 0: only at the end and after a signal.
        strategy: ddp or fsdp.
        deepspeed: the settings of DeepSpeed's engine, which then replaces `strategy`.
        objective: the loss of a model on rows (b, T + 1); not for DeepSpeed.
        rate_of: factor of the learning rate, by parameter name; not for DeepSpeed.
    """

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
        """This rank's rows of a step: `accumulation` parts, each (b, T + 1)."""
        shares = self.batch_at(step).chunk(self.ranks.count)
        return shares[self.ranks.rank].to(self.ranks.device).chunk(self.accumulation)


@dataclass
class TrainingRun:
    """What a training leaves behind, and what its checkpoints carry.

    Attributes:
        losses: the training loss of each step, in nats per token.
        curve: the points to plot.
        seconds: the time of all steps; evaluation is not part of it.
        tokens: tokens predicted, over all ranks.
        skipped_steps: steps that float16 skipped because gradients overflowed.
    """

    losses: list[float] = field(default_factory=list)
    curve: list[CurvePoint] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    skipped_steps: int = 0

    @property
    def final_loss(self) -> float:
        """The mean loss of the last tenth of the steps, in nats per token."""
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
    """Train `model` in place, from its newest checkpoint if there is one. Collective.

    Args:
        look: returns a held-out loss in nats per token; its time is not counted.
        on_step: called after each step.
        checkpoints: where to save and resume; None: nowhere.
        say: prints a line.

    Raises NonFiniteLoss, naming step and layer, before such a loss reaches the weights;
    Interrupted after a signal, when the checkpoint is written; RankLost if another rank
    is lost.
    """
    looks = {round(plan.steps * i / (LOOKS - 1)) for i in range(LOOKS)}
    log_every = max(1, plan.steps // LOGGED_POINTS)
    model.to(plan.ranks.device)
    engine, run = resume(model, plan, checkpoints, say)
    saved = len(run.losses)
    # A training that resumes has measured this before its first checkpoint.
    if not run.curve:
        untrained = check_finite(look(), "the held-out loss before training")
        run.curve.append(
            CurvePoint(step=0, tokens=0, seconds=0.0, train_loss=None, eval_loss=untrained)
        )
    model.train()
    with stop_request() as request:
        for step in range(len(run.losses), plan.steps):
            with lost_ranks_said(f"at step {step + 1}"):
                stop = take_step(model, engine, plan, step, run, request)
                done = step + 1
                if done % log_every == 0 or done in looks:
                    held_out = (
                        check_finite(look(), f"the held-out loss after step {done}")
                        if done in looks
                        else None
                    )
                    run.curve.append(curve_point(run, log_every, held_out))
                    # `look` leaves the model in evaluation mode.
                    model.train()
                on_step(run)
                due = done == plan.steps or (plan.save_steps and done % plan.save_steps == 0)
                # All ranks decide alike, or one would wait in `save` for the others.
                if checkpoints is not None and (stop or due) and done > saved:
                    save(engine, plan, checkpoints, run)
                    saved = done
            if stop:
                raise Interrupted(stop, f"after step {done} of {plan.steps}")
        # A signal that came after the last step's exchange; some ranks may not have got
        # it.
        late = signal_of(*plan.ranks.sum((request.got(SIGTERM), request.got(SIGINT))))
        if late:
            raise Interrupted(late, f"after step {plan.steps} of {plan.steps}")
    return run


def signal_of(terminated: float, interrupted: float) -> int:
    """The signal to stop on, given how many ranks got SIGTERM and SIGINT; 0: none."""
    return SIGTERM if terminated else SIGINT if interrupted else 0


def make_engine(model: nn.Module, plan: TrainingPlan) -> Engine:
    """The engine that the plan asks for, around the model. Collective."""
    if plan.deepspeed is None:
        return TorchEngine(
            model,
            plan.learning_rate,
            plan.precision,
            plan.ranks,
            plan.strategy,
            plan.objective,
            plan.rate_of,
        )
    if plan.ranks.device.type == "cpu":
        # Otherwise DeepSpeed warns, on every rank, that it had to guess.
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    # Imported only now: DeepSpeed is optional, and reads the variable above when it is
    # imported.
    from mka.training.deepspeed_engine import DeepSpeedEngine

    rows = len(plan.parts_at(0)[0])
    return DeepSpeedEngine(
        model,
        plan.learning_rate,
        plan.precision,
        plan.ranks,
        plan.deepspeed,
        rows,
        plan.accumulation,
    )


def take_step(
    model: nn.Module,
    engine: Engine,
    plan: TrainingPlan,
    step: int,
    run: TrainingRun,
    request: StopRequest,
) -> int:
    """Take one optimizer step on all ranks, and add it to `run`. Collective.

    Returns the signal to stop on, or 0. Raises NonFiniteLoss before such a loss or
    gradient reaches the weights.
    """
    started = time.perf_counter()
    parts = plan.parts_at(step)
    losses = engine.gradients(parts)
    # Parts and ranks have equal shares, so a mean of means is the mean over all tokens.
    mine = torch.stack(losses).double().mean().item()
    # One exchange per step: the ranks agree on the loss, and on whether to stop.
    total, terminated, interrupted = plan.ranks.sum(
        (mine, request.got(SIGTERM), request.got(SIGINT))
    )
    loss = total / plan.ranks.count
    if not math.isfinite(loss):
        layer = explain(model, parts, losses, plan.precision.autocast(), plan.ranks)
        raise NonFiniteLoss(f"the loss at step {step + 1} is {loss}; {layer}; {ADVICE}")
    try:
        run.skipped_steps += engine.step(learning_rate_at(step, plan.steps, plan.learning_rate))
    except NonFiniteGradient as error:
        raise NonFiniteLoss(
            f"at step {step + 1} {error}, the loss is {loss:.4g}; {ADVICE}"
        ) from None
    # CUDA works asynchronously; without waiting, the time would be that of issuing the
    # work.
    if plan.ranks.device.type == "cuda":
        torch.cuda.synchronize(plan.ranks.device)
    run.losses.append(loss)
    run.seconds += time.perf_counter() - started
    run.tokens += plan.ranks.count * sum(part[:, 1:].numel() for part in parts)
    return signal_of(terminated, interrupted)


def check_finite(loss: float, what: str) -> float:
    """The loss, unchanged. Raises NonFiniteLoss, saying `what` it is, if it is not
    finite."""
    if not math.isfinite(loss):
        raise NonFiniteLoss(f"{what} is {loss}; {ADVICE}")
    return loss


def save(engine: Engine, plan: TrainingPlan, checkpoints: Checkpoints, run: TrainingRun) -> None:
    """Save a checkpoint of what was done so far; the first rank writes it.
    Collective."""
    # Every rank takes part in gathering the state, although only the first one needs
    # it.
    weights, optimizer, rest = engine.state()
    if plan.ranks.is_main:
        checkpoints.save(
            Checkpoint(len(run.losses), weights, optimizer, {"run": asdict(run), "engine": rest})
        )


def resume(
    model: nn.Module,
    plan: TrainingPlan,
    checkpoints: Checkpoints | None,
    say: Callable[[str], None],
) -> tuple[Engine, TrainingRun]:
    """An engine, and what was done before: all of the newest whole checkpoint, or
    nothing.

    Collective; only the first rank reads the checkpoint.
    """
    found: list[Checkpoint] = []

    def read() -> dict[str, Any] | None:
        """Read the newest whole checkpoint into `found`; returns its progress, or
        None."""
        checkpoint = checkpoints.newest(say) if checkpoints is not None else None
        if checkpoint is None:
            return None
        found.append(checkpoint)
        say(f"Resuming after step {checkpoint.step} of {plan.steps}")
        return checkpoint.progress

    progress = plan.ranks.on_main(read)
    if progress is None:
        return make_engine(model, plan), TrainingRun()
    # The weights before the engine, which may divide them among the ranks.
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
    """The point after the last step, with the mean training loss of the last
    `log_every` steps."""
    recent = run.losses[-log_every:]
    return CurvePoint(
        step=len(run.losses),
        tokens=run.tokens,
        seconds=run.seconds,
        train_loss=sum(recent) / len(recent),
        eval_loss=eval_loss,
    )
