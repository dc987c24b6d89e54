"""What a comparison trains: mechanisms or variants of them; and the studies, named sets
of these.

small    the comparison in the README and in docs/results.md
routing  mka, routed by the query, against fmka, routed by the key, with the same
         memories
decay, levels, window, chunk, top_k, router
         the ablations of mka and fmka in docs/ablations.md
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Arm:
    """A mechanism to train, and the options in which it differs from what the flags
    set.

    `variant` names these options in file names and reports; "" if there are none.
    """

    attention_type: str
    variant: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The mechanism and its variant, as in file names: mka, mka-w64."""
        return f"{self.attention_type}-{self.variant}" if self.variant else self.attention_type


@dataclass(frozen=True)
class Study:
    """What a study trains, and the settings that it uses unless the command line gives
    others."""

    arms: tuple[Arm, ...]
    max_steps: int
    seeds: tuple[int, ...]
    match: str = "none"


def plain(*kinds: str) -> tuple[Arm, ...]:
    """Mechanisms as the flags set them, one arm each."""
    return tuple(Arm(kind) for kind in kinds)


def ablation(variants: Mapping[str, Mapping[str, Any]]) -> Study:
    """A study of mka and fmka as the flags set them, and of each variant of both.

    variants: the options of a variant, by its name.
    """
    arms = []
    for kind in ("mka", "fmka"):
        arms.append(Arm(kind))
        arms += [Arm(kind, name, options) for name, options in variants.items()]
    # A quarter of the steps of "small" and two seeds: there are up to eight trainings
    # per seed.
    return Study(tuple(arms), max_steps=250, seeds=(0, 1))


# A variant's name becomes part of file names and of finished results, so it must not
# change.
STUDIES = {
    "small": Study(
        (
            *plain("mha"),
            # The window of mka and fmka without their memories: what the memories are
            # worth.
            Arm("mha", "w128", {"local_window": 128}),
            *plain("mqa", "gqa", "mla", "mka", "fmka"),
        ),
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
