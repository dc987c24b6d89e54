"""Peak memory of reading a long context, by where the long-term memory is kept.

    python benchmarks/long_memory.py
    python benchmarks/long_memory.py --stores disk --lengths 1048576

The memory is on the device, in host memory or on disk. One layer of mka as in
benchmarks/long_context.py (512 wide, 8 heads, 2 key/value heads, w = 256, c = 64, K = 4, bfloat16)
reads pieces of 4,096 tokens, each case in a process of its own. The result is the highest resident
memory while it reads, above that before, including mapped files. Prints one line of JSON per case.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from long_context import HIDDEN_SIZE, layer
from mka.memory.options import LongTermConfig
from mka.memory.places import LongTerm
from mka.training.memory import resident_bytes

NUM_KV_HEADS = 2


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    stores: tuple[str, ...] = ("disk", "host", "device")
    """Where to keep the long-term memory: disk, host or device."""
    lengths: tuple[int, ...] = (131072, 262144, 524288, 1048576)
    """Lengths of the contexts, in tokens."""
    kind: str = "mka"
    """The mechanism, a name in long_context.KINDS with a memory: mka, routed or fmka."""
    piece: int = 4096
    """Tokens to read at a time."""


def main(options: Options) -> None:
    """Measure each case in a process of its own."""
    # The high-water mark of a process includes all that it has ever held.
    for store in options.stores:
        for tokens in options.lengths:
            case = [
                sys.executable,
                __file__,
                "--stores",
                store,
                "--lengths",
                str(tokens),
                "--kind",
                options.kind,
            ]
            alone = [*case, "--piece", str(options.piece), "--alone"]
            subprocess.run(alone, check=True)  # noqa: S603


@torch.no_grad()
def read(store: str, tokens: int, kind: str, piece: int) -> None:
    """Read random tokens in pieces, and print the peak memory as a line of JSON."""
    torch.manual_seed(0)
    attn = layer(kind, torch.bfloat16, NUM_KV_HEADS)
    config = LongTermConfig(longterm_store=store)  # pyright: ignore[reportArgumentType]
    state = attn.initial_state(1, longterm=LongTerm.of(config))
    x = torch.randn(1, piece, HIDDEN_SIZE, dtype=torch.bfloat16)
    # Once before, with another state, so that the libraries' own memory is not counted.
    attn(x, state=attn.initial_state(1))
    # 5 resets the process's peak resident set size, see proc(5).
    Path("/proc/self/clear_refs").write_text("5")
    before, begun = resident_bytes("VmRSS"), time.perf_counter()
    # Inputs are drawn piece by piece; a million of them at once would be counted too.
    for start in range(0, tokens, piece):
        attn(
            torch.randn(1, min(piece, tokens - start), HIDDEN_SIZE, dtype=torch.bfloat16),
            state=state,
        )
    row = {
        "kind": kind,
        "store": store,
        "tokens": tokens,
        "piece": piece,
        "seconds": round(time.perf_counter() - begun, 1),
        "peak_mib": round((resident_bytes("VmHWM") - before) / 2**20, 1),
        "state_mib": round(state.nbytes / 2**20, 1),
    }
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    # How `main` starts a case; not an option for users.
    if "--alone" in sys.argv:
        alone = tyro.cli(
            Options, args=[word for word in sys.argv[1:] if word != "--alone"], use_underscores=True
        )
        read(alone.stores[0], alone.lengths[0], alone.kind, alone.piece)
    else:
        main(tyro.cli(Options, description=__doc__, use_underscores=True))
