"""What a rank does: scores held-out splits with a model in shares and, by itself, with the whole
model; prints both."""

from dataclasses import asdict
from typing import Any

from train_cases import MEMORY, deepspeed_settings, run_cases

import checks_training as tiny
from mka.data import evaluation_batches
from mka.distributed import Ranks
from mka.evaluation import HeldOutLoss, held_out_loss
from mka.training.loop import make_engine

BATCH_SIZE = 2


def score(model: Any, num_tokens: int, ranks: Ranks) -> HeldOutLoss:
    """Of a split of so many tokens, made up from a seed. Collective if the ranks are several."""
    batches = evaluation_batches(tiny.held_out_split(num_tokens), tiny.LENGTH, BATCH_SIZE)
    return held_out_loss(model, batches, tiny.CPU, None, ranks)


def run_case(case: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """Every rank's sums over each of the splits, and those that it finds alone. Collective."""
    strategy, sizes = case["strategy"], case["tokens"]
    model = tiny.tiny_model("fmka", **MEMORY)
    alone = [asdict(score(model, size, Ranks())) for size in sizes]
    settings = {
        "strategy": "fsdp" if strategy == "fsdp" else "ddp",
        "deepspeed": deepspeed_settings(strategy),
    }
    make_engine(model, tiny.plan(ranks=ranks, **settings))
    shared = [asdict(score(model, size, ranks)) for size in sizes]
    return {"name": strategy, "alone": ranks.gather(alone), "shared": ranks.gather(shared)}


if __name__ == "__main__":
    run_cases(run_case)
