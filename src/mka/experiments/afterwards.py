"""What is observed once the trainings of a run are done: what a layer costs as the context grows, what routers do.

Trained models are loaded one after the other. Times are of one layer of each, all of them taking turns.
"""

import time
from copy import deepcopy
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from mka.attention import CausalAttention
from mka.evaluation import routing_of
from mka.experiments.comparison import Comparison
from mka.loading import load
from mka.models import mechanisms
from mka.observations import Cost, Routing, read_costs, routing_path, write_costs, write_routing
from mka.results import Result, read_results

CONTEXTS = (1, 2, 4, 8, 16)
"""Lengths of a row, in contexts of the run."""
TURNS = 3
WATCHED_TOKENS = 2**13
"""Held-out tokens that routers are watched on."""
ROUTED = ("mka", "fmka")
STATE_DTYPE = torch.bfloat16


def observe_models(comparison: Comparison) -> None:
    """Complete routing/ of the run's folder, and costs.jsonl if a mechanism is not in it."""
    folder = comparison.folder
    models = {result.key: result for result in read_results(folder) if weights_of(folder, result).is_file()}
    measured = {cost.name for cost in read_costs(folder)}
    all_anew = any(result.name not in measured for result in models.values())
    layers: dict[str, CausalAttention] = {}
    for (name, seed), result in models.items():
        unseen = result.attention_type in ROUTED and not routing_path(folder, name, seed).is_file()
        if not unseen and (name in layers or not all_anew):
            continue
        model, tokenizer = load(str(weights_of(folder, result).parent))
        layers.setdefault(name, deepcopy(mechanisms(model)[0]))
        if unseen:
            batches = [rows[:, :-1] for rows, _ in comparison.held_out(WATCHED_TOKENS)]
            text = [tokenizer.decode([token]) for token in batches[0][0].tolist()]
            write_routing(folder, Routing(name=name, seed=seed, text=text, **routing_of(model, batches)))
    if all_anew:
        write_costs(folder, measure(comparison, layers))


def weights_of(folder: Path, result: Result) -> Path:
    """Where the trained weights of a result were exported to."""
    return folder / "models" / f"{result.name}-seed{result.seed}" / "model.safetensors"


@torch.no_grad()
def measure(comparison: Comparison, layers: dict[str, CausalAttention]) -> list[Cost]:
    """Every layer at every length, in bfloat16 or whatever the run's precision makes of it."""
    device, costs = comparison.ranks.device, []
    for tokens in (count * comparison.config.sequence_length for count in CONTEXTS):
        x = torch.randn(1, tokens, next(iter(layers.values())).hidden_size, generator=torch.manual_seed(0)).to(device)
        turns = [{name: seconds(comparison, attn.to(device), x) for name, attn in layers.items()} for _ in range(TURNS)]
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
    with comparison.precision.autocast():
        synchronize(x.device)
        started = time.perf_counter()
        attn(x)
        synchronize(x.device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
