"""Every number at which the code takes another path, and values that lead down each of them on
short rows."""

import sys
from typing import Any

import pytest

import mka.attention
import mka.memory.bank
from mka.memory import disk, local, longterm, options, search, state
from mka.ops import attend, chunks, fused, scan, unions

Change = tuple[Any, str, Any]
NEVER_GATHERED: list[Change] = [
    (longterm, "GATHERED_PAIRS", 0),
    (longterm, "GATHERED_PAIRS_PER_CHUNK", 0),
]
SWITCHES: dict[str, list[Change]] = {
    "windowed blocks of two": [(attend, "MIN_BLOCK", 2), (local, "MIN_BLOCK", 2)],
    "a mask for three queries": [(attend, "QUERY_TILE", 3)],
    "a mask of few elements": [(attend, "MASK_SIZE", 40)],
    "eight pairs sorted together": [(chunks, "QUERY_PAIRS", 8)],
    "two pairs to a block": [(chunks, "BLOCK", 2)],
    "one pair to a block": [(chunks, "BLOCK", 1)],
    "three blocks at once": [(chunks, "BLOCKS", 3)],
    "a scan in blocks of two": [(scan, "block_size", lambda tokens: 2)],
    "a scan in one block": [(scan, "block_size", lambda tokens: 128)],
    "five queries scored at once": [(search, "QUERY_TILE", 5)],
    "four summaries scored at once": [(search, "SUMMARY_TILE", 4)],
    "all heads of one query scored at once": [(search, "SCORES", 1), (search, "SCORES_ON_GPU", 1)],
    "the scores of few queries at once": [(search, "SCORES", 300)],
    "always sorted by chunk": [*NEVER_GATHERED, (unions, "LARGEST_UNION", 0)],
    "neighbors always together": [*NEVER_GATHERED, (unions, "LARGEST_UNION", 10**9)],
    "three neighbors together": [
        *NEVER_GATHERED,
        (unions, "LARGEST_UNION", 10**9),
        (unions, "QUERIES", 3),
    ],
    "few unions at once": [
        *NEVER_GATHERED,
        (unions, "LARGEST_UNION", 10**9),
        (unions, "GATHERED", 300),
    ],
    "no fused kernel": [(fused, "FUSED", ())],
    "always gathered": [(longterm, "GATHERED_PAIRS", 10**9)],
    "stores that grow by one": [(state, "STEP", 1)],
}
"""What a call without a long-term store of its own, or one on the device, can meet."""
STORED: dict[str, list[Change]] = {
    "records fetched for one query": [(longterm, "TILE_BYTES", 1)],
    "no page stays mapped": [(disk, "SMALL_READ", 0)],
    "rows copied in pieces": [(disk, "COPY_BYTES", 16)],
    "documents copied in pieces": [(mka.memory.bank, "COPIED_CHUNKS", 2)],
}
"""What chunks that are kept in host memory or in a file can meet besides."""
SMALL_TOGETHER = (
    *(
        "windowed blocks of two",
        "a mask for three queries",
        "a scan in blocks of two",
        "five queries scored at once",
    ),
    *("four summaries scored at once", "always sorted by chunk", "two pairs to a block"),
    *("three blocks at once", "stores that grow by one", "records fetched for one query"),
)
SWITCHES["all of them small"] = [
    change for name in SMALL_TOGETHER for change in (SWITCHES | STORED)[name]
]
ALL = SWITCHES | STORED
NO_SWITCHES = {
    "memory.bank.FORMAT",
    "memory.bank.LARGEST_INFO",
    "ops.attend.LARGEST_RATIO",
    *(
        "ops.fused.CHANNELS",
        "ops.fused.SUMS",
        "ops.fused.BIASES",
        "ops.fused.UNMASKED",
        "ops.fused.CAUSAL",
    ),
    "attention.mka.PROPOSED",
    "memory.session.SHORTEST",
    "memory.session.LONGEST",
}
"""Numbers that decide what is computed, or what a file looks like: another value is another
result."""


def switch(patch: pytest.MonkeyPatch, changes: list[Change]) -> None:
    for module, name, value in changes:
        patch.setattr(module, name, value)


def numbers_in_the_code() -> dict[str, Any]:
    """Constants of the rooms below the models that are numbers, by module and name; those that
    another module imports are read there too. Numbers of the levels are names, not sizes, and
    defaults of options (mka.memory.options) are read where a mechanism is made."""
    rooms, levels = (
        ("mka.ops.", "mka.memory.", "mka.attention."),
        {"LOCAL", "SESSION", "LONG_TERM", "NUM_LEVELS", *vars(options)},
    )
    found = {}
    for module_name, module in sorted(sys.modules.items()):
        if module_name.startswith(rooms):
            for name, value in vars(module).items():
                if name.isupper() and isinstance(value, int | float) and name not in levels:
                    found[f"{module_name.removeprefix('mka.')}.{name}"] = value
    return found


def patched_names() -> set[str]:
    return {
        f"{module.__name__.removeprefix('mka.')}.{name}"
        for changes in ALL.values()
        for module, name, value in changes
        if isinstance(value, int | float)
    }
