"""What a comparison trains: a mechanism, or a variant of one; and the studies, which are named sets of them.

small                                  what README and docs/results.md show
decay levels window chunk top_k router the ablations of mka and fmka, docs/ablations.md
routing                                routed by the query (mka) or by the key (fmka), with the same memories
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Arm:
    """A mechanism with `options` over those that the flags give it; `variant` names them, "" for none."""

    attention_type: str
    variant: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """As files are named: mka, mka-w64."""
        return f"{self.attention_type}-{self.variant}" if self.variant else self.attention_type


@dataclass(frozen=True)
class Study:
    """Arms, and the settings that hold where the command line gives none."""

    arms: tuple[Arm, ...]
    max_steps: int
    seeds: tuple[int, ...]
    match: str = "none"


def plain(*kinds: str) -> tuple[Arm, ...]:
    return tuple(Arm(kind) for kind in kinds)


def ablation(variants: Mapping[str, Mapping[str, Any]]) -> Study:
    """mka and fmka as they are, and each variant of both."""
    arms = [
        Arm(kind, name, options) for kind in ("mka", "fmka") for name, options in ({"": {}} | dict(variants)).items()
    ]
    return Study(tuple(arms), max_steps=250, seeds=(0, 1))


STUDIES = {
    "small": Study(
        (*plain("mha"), Arm("mha", "w128", {"local_window": 128}), *plain("mqa", "gqa", "mla", "mka", "fmka")),
        max_steps=1000,
        seeds=(0, 1, 2),
        match="parameters",
    ),
    "decay": ablation({"decay0.9": {"session_decay": 0.9}}),
    "levels": ablation(
        {
            "no-L2": {"session_decay": None},
            "no-L3": {"top_k": 0},
            "L1-alone": {"session_decay": None, "top_k": 0},
        }
    ),
    "window": ablation({f"w{w}": {"local_window": w} for w in (64, 256)}),
    "chunk": ablation({f"c{c}": {"chunk_size": c} for c in (8, 32)}),
    "top_k": ablation({f"K{k}": {"top_k": k} for k in (2, 8)}),
    "router": ablation({f"router{size}": {"router_size": size} for size in (16, 512)}),
    "routing": Study(plain("mka", "fmka"), max_steps=250, seeds=(0, 1)),
}
