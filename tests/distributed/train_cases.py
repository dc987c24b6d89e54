"""What a rank does: trains the cases given as JSON, one after the other, and prints what each gave
as a JSON line."""

import hashlib
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import checks_training as tiny
from mka.distributed import Ranks, start_ranks
from mka.models import checkpoint_blocks
from mka.training import Precision, TrainingPlan, train
from mka.training import loop as loop_module

GLOBAL_ROWS, PARTS_OF_ALL_RANKS = 8, 4
STEPS = 50
PLANTED_STEP = 5
MEMORY = {"local_window": 6, "chunk_size": 2, "top_k": 2}


def deepspeed_settings(strategy: str) -> dict[str, Any] | None:
    """Stage 3 keeps no small parameter whole, so that all of this small model is in shares."""
    if not strategy.startswith("zero"):
        return None
    stage = int(strategy.removeprefix("zero"))
    return {
        "zero_optimization": {"stage": stage}
        | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {})
    }


def plan_of(case: dict[str, Any], ranks: Ranks) -> TrainingPlan:
    """The same rows on any number of ranks: four parts, spread over the ranks."""
    return tiny.plan(
        steps=case.get("steps", STEPS),
        accumulation=PARTS_OF_ALL_RANKS // ranks.count,
        precision=Precision(case.get("precision", "float32"), "cpu"),
        ranks=ranks,
        strategy=case["strategy"] if case["strategy"] in ("ddp", "fsdp") else "ddp",
        deepspeed=deepspeed_settings(case["strategy"]),
    )


def overflowing(rank: int) -> Callable[..., int]:
    """take_step whose gradients, in one step, are infinite on one rank; the losses stay finite."""
    take_step = loop_module.take_step

    def with_infinity(module: nn.Module, inputs: object, output: Tensor) -> None:
        output.register_hook(lambda gradient: gradient * float("inf"))

    def replacement(model: Any, engine: Any, plan: TrainingPlan, step: int, *rest: Any) -> int:
        planted = step == PLANTED_STEP and plan.ranks.rank == rank
        hook = model.transformer.ln_f.register_forward_hook(with_infinity) if planted else None
        try:
            return take_step(model, engine, plan, step, *rest)
        finally:
            if hook is not None:
                hook.remove()

    return replacement


def batches_seen(plan: TrainingPlan) -> str:
    """A digest of the rows of all steps, put together from what each rank takes. Collective."""
    digest = hashlib.sha256()
    for step in range(plan.steps):
        for share in plan.ranks.gather(torch.cat(plan.parts_at(step))):
            digest.update(share.numpy().tobytes())
    return digest.hexdigest()


def digest_of(model: nn.Module) -> str:
    """Of the weights this rank holds."""
    local = [p.to_local() if hasattr(p, "to_local") else p for p in model.parameters()]  # pyright: ignore
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in local)).hexdigest()


def run_case(case: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Train one case. Collective."""
    model: Any = tiny.tiny_model(
        case["kind"], **(MEMORY if case["kind"] in ("mka", "fmka") else {})
    )
    if case.get("checkpointing"):
        checkpoint_blocks(model)
    plan = plan_of(case, ranks)
    planted = case.get("planted_rank")
    fault = (
        nullcontext()
        if planted is None
        else patch.object(loop_module, "take_step", overflowing(planted))
    )
    with fault:
        run = train(model, plan, look=lambda: 0.0)
    return {
        "name": case["name"],
        "losses": run.losses,
        "skipped": ranks.gather(run.skipped_steps),
        "batches": batches_seen(plan),
        "weights": ranks.gather(digest_of(model)),
    }


def run_cases(run: Callable[[dict[str, Any], Ranks], dict[str, Any]]) -> None:
    """Those given as JSON, one after the other; the first rank prints what each gave."""
    ranks = start_ranks(120)
    for case in json.loads(sys.argv[1]):
        outcome = run(case, ranks)
        if ranks.is_main:
            print(json.dumps(outcome), flush=True)
    ranks.part()


if __name__ == "__main__":
    run_cases(run_case)
