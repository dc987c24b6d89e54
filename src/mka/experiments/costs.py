"""What is measured after the trainings of a run: costs as the context grows, and
routers.

Trained models are loaded one after the other. Times are those of one layer of each
model; the layers take turns.
"""

import time
from copy import deepcopy
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mka.attention import CausalAttention
from mka.evaluation import routing_of
from mka.experiments.comparison import Comparison
from mka.models import mechanisms
from mka.models.loading import load
from mka.record.mechanisms import MECHANISMS
from mka.record.results import (
    Cost,
    Routing,
    RunFolder,
    read_costs,
    read_results,
    write_costs,
    write_routing,
)

CONTEXTS = (1, 2, 4, 8, 16)
"""Lengths of a row, as multiples of the run's sequence length."""
TURNS = 3
"""How often each time is measured; the median counts."""
WATCHED_TOKENS = 2**13
"""Held-out tokens that routers are observed on."""
STATE_DTYPE = torch.bfloat16
"""The type that states are counted in, whatever a training computes in."""


def observe_models(comparison: Comparison) -> None:
    """Write the missing files of routing/, and costs.jsonl if a mechanism is not in it.

    Raises an error of torch's if memory runs out.
    """
    folder = comparison.folder
    models = {
        result.key: result
        for result in read_results(folder)
        if RunFolder(folder).weights(*result.key).is_file()
    }
    measured = {cost.name for cost in read_costs(folder)}
    # All or none: only times that were measured in turns, on one machine, can be
    # compared.
    measure_all = any(result.name not in measured for result in models.values())
    layers: dict[str, CausalAttention] = {}
    for (name, seed), result in models.items():
        # Costs do not depend on the seed, so one layer per name is enough; routers do.
        unseen = (
            MECHANISMS[result.attention_type].has_memory
            and not RunFolder(folder).routing(name, seed).is_file()
        )
        if not unseen and (name in layers or not measure_all):
            continue
        model, tokenizer = load(str(RunFolder(folder).weights(*result.key).parent))
        # A copy, so that the rest of the model can be freed.
        layers.setdefault(name, deepcopy(mechanisms(model)[0]))
        if unseen:
            batches = [rows[:, :-1] for rows, _ in comparison.held_out(WATCHED_TOKENS)]
            text = [tokenizer.decode([token]) for token in batches[0][0].tolist()]
            write_routing(
                folder, Routing(name=name, seed=seed, text=text, **routing_of(model, batches))
            )
    if measure_all:
        write_costs(folder, measure(comparison, layers))


@torch.no_grad()
def measure(comparison: Comparison, layers: dict[str, CausalAttention]) -> list[Cost]:
    """The costs of every layer at every length, computed in the run's precision."""
    device, costs = comparison.ranks.device, []
    width = next(iter(layers.values())).hidden_size
    for count in CONTEXTS:
        tokens = count * comparison.config.sequence_length
        x = torch.randn(1, tokens, width, generator=torch.manual_seed(0)).to(device)
        # In turns, so that a machine that gets busy slows down all layers alike.
        turns = [
            {name: seconds(comparison, attn.to(device), x) for name, attn in layers.items()}
            for _ in range(TURNS)
        ]
        for name, attn in layers.items():
            costs.append(
                Cost(
                    name=name,
                    tokens=tokens,
                    milliseconds=round(1000 * median(turn[name] for turn in turns), 4),
                    state_bytes=attn.state_nbytes(1, tokens, STATE_DTYPE),
                    flops_per_token=attn.flops_per_token(tokens),
                )
            )
    return costs


def seconds(comparison: Comparison, attn: Any, x: Tensor) -> float:
    """The time of one forward pass over x (B, T, C), in seconds."""
    with comparison.precision.autocast():
        synchronize(x.device)
        started = time.perf_counter()
        attn(x)
        synchronize(x.device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    """Wait until CUDA has done what it was asked to do; on the CPU there is nothing to
    wait for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
