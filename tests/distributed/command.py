"""The benchmark on the preset "tiny", with a fault planted on one rank where the environment asks
for one."""

import os
import signal
import sys
import time
from typing import Any

import torch

from mka import cli
from mka.record.config import PRESETS
from mka.training import loop, precision
from tiny_runs import TINY

FAULT, FAULTY_RANK, FAULTY_STEP = (
    os.environ.get(name, "") for name in ("FAULT", "FAULTY_RANK", "FAULTY_STEP")
)


def take_step(model: Any, engine: Any, plan: Any, step: int, *rest: Any) -> int:
    """The loop's own, with the fault before it."""
    if step == int(FAULTY_STEP):
        match FAULT:
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "hangs":
                time.sleep(600)
            case "nan":
                with torch.no_grad():
                    model.transformer.h[1].mlp.c_fc.weight[0, 0] = float("nan")
    return plain_take_step(model, engine, plan, step, *rest)


plain_take_step = loop.take_step
if __name__ == "__main__":
    PRESETS["tiny"] = TINY
    if "FLOAT32" in os.environ:
        precision.has_bfloat16 = lambda device: False
    arguments = sys.argv[1:]
    if os.environ.get("RANK", "0") == FAULTY_RANK or FAULTY_RANK == "all":
        if FAULT == "other settings":
            arguments += ["--learning_rate", "0.5"]
        elif FAULT:
            loop.take_step = take_step
    sys.exit(cli.bench(arguments))
