"""What was observed on the trained models of a run folder, beside their results. No torch here.

costs.jsonl   what one layer of each mechanism costs at several lengths, a `Cost` a line
routing/      what the router of mka or fmka does with held-out text, a `Routing` a trained model
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mka.folders import read_noted, write_noted
from mka.limits import InputError

COLLAPSED = 0.05
"""Entropy below which a router is said to have collapsed."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """One layer reading one row of `tokens` tokens at once: the median time of its forward pass without gradients, the
    bytes of its state in bfloat16 afterwards, and the FLOPs of its last token. `name` is the result's."""

    name: str
    tokens: int
    milliseconds: float
    state_bytes: int
    flops_per_token: int


@dataclass(frozen=True, kw_only=True)
class Routing:
    """Shares are lambda of L1, L2, L3.

    shares   [layer][piece of the row][level], the mean over tokens that have a choice; piece i is tokens edges[i] to
             edges[i + 1] of a row
    entropy  [layer], 1: an even mix of the levels that exist, 0: one level alone; None where no token has a choice
    text     the first held-out row, a string for each of its tokens
    served   [token][level], the mean over layers
    """

    name: str
    seed: int
    edges: list[int]
    shares: list[list[list[float]]]
    entropy: list[float | None]
    text: list[str]
    served: list[list[float]]


def costs_path(folder: Path) -> Path:
    return folder / "costs.jsonl"


def routing_path(folder: Path, name: str, seed: int) -> Path:
    return folder / "routing" / f"{name}-seed{seed}.json"


def write_costs(folder: Path, costs: Sequence[Cost]) -> None:
    write_noted(folder, costs_path(folder), "".join(json.dumps(asdict(cost)) + "\n" for cost in costs))


def write_routing(folder: Path, routing: Routing) -> None:
    write_noted(folder, routing_path(folder, routing.name, routing.seed), json.dumps(asdict(routing)) + "\n")


def read_costs(folder: Path) -> list[Cost]:
    """Empty where there is no such file. Raises InputError for a damaged one."""
    path = costs_path(folder)
    data = read_noted(folder, path)
    if data is None:
        return []
    try:
        return [Cost(**json.loads(line)) for line in data.splitlines()]
    except (ValueError, TypeError):
        raise InputError(f"{path} is damaged: not one cost a line; delete it and run `mka bench` again") from None


def read_routing(folder: Path, name: str, seed: int) -> Routing | None:
    """None where there is no such file. Raises InputError for a damaged one."""
    path = routing_path(folder, name, seed)
    data = read_noted(folder, path)
    if data is None:
        return None
    try:
        return Routing(**json.loads(data))
    except (ValueError, TypeError):
        raise InputError(f"{path} is damaged; delete it and run `mka bench` again") from None
