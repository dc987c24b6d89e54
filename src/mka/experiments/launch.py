"""How a run was started, and how the rows of an optimizer step are divided among its
ranks."""

import os
from typing import Any

from mka.distributed import Ranks
from mka.errors import InputError
from mka.record.config import ResolvedConfig
from mka.training import deepspeed_settings


def read_deepspeed(config: ResolvedConfig) -> dict[str, Any] | None:
    """DeepSpeed's settings; None if it is not used.

    Raises InputError, before the ranks meet, for a file or a start that cannot work.
    """
    if not config.deepspeed:
        return None
    settings = deepspeed_settings(config.deepspeed_config)
    if "RANK" not in os.environ:
        command = "deepspeed src/experiments/benchmark.py --deepspeed"
        raise InputError(f"--deepspeed needs a launcher; start it as {command}, or by torchrun")
    return settings


def describe_launch(
    config: ResolvedConfig, ranks: Ranks, parts: int, deepspeed: dict[str, Any] | None = None
) -> dict[str, Any]:
    """What started the ranks, how many there are, and how they share the work, ready
    for JSON.

    parts: forward passes per optimizer step on each rank.
    """
    # torchrun does not say how many machines there are; each is assumed to have as many
    # ranks.
    machines = ranks.count // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", ranks.count)))
    return {
        "started_by": started_by(),
        "world_size": ranks.count,
        "machines": machines,
        "strategy": strategy_name(config, ranks, deepspeed),
        "gradient_accumulation_steps": parts,
        "gradient_checkpointing": config.gradient_checkpointing,
    }


def started_by() -> str:
    """The launcher of this process: torchrun, deepspeed or python."""
    # Each launcher leaves a variable of its own in the environment of what it starts.
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    return "deepspeed" if "CROSS_RANK" in os.environ else "python"


def strategy_name(config: ResolvedConfig, ranks: Ranks, deepspeed: dict[str, Any] | None) -> str:
    """How the ranks share the work: deepspeed zero1 to zero3, ddp, fsdp or one
    process."""
    if deepspeed is not None:
        return f"deepspeed zero{deepspeed['zero_optimization']['stage']}"
    return config.strategy if ranks.count > 1 else "one process"


def accumulation(global_batch_size: int, batch_size: int, num_ranks: int) -> int:
    """Forward passes per step on each rank: as few as possible, of at most `batch_size`
    rows each.

    All have the same number of rows. Raises InputError if the ranks cannot take equal
    shares.
    """
    # Unequal shares would weight rows differently, because ranks average their
    # gradients.
    if global_batch_size % num_ranks:
        allowed = [
            str(ranks)
            for ranks in range(1, global_batch_size + 1)
            if global_batch_size % ranks == 0
        ]
        raise InputError(
            f"{num_ranks} ranks do not divide the global batch of {global_batch_size} rows that "
            f"this run was started with; allowed: {', '.join(allowed)}"
        )
    share = global_batch_size // num_ranks
    return next(
        parts
        for parts in range(1, share + 1)
        if share % parts == 0 and share // parts <= batch_size
    )
