"""Peak memory of reading a long context with the long-term memory on the device, in host memory and on disk.

    python benchmarks/long_memory.py
    python benchmarks/long_memory.py --stores disk --lengths 1048576

One layer of mka as in benchmarks/long_context.py (512 wide, 8 heads, 2 key/value heads, w = 256, c = 64, K = 4,
bfloat16), read in pieces of 4,096 tokens, each case in a process of its own; the figure is the highest resident memory
while it reads, above what stood before, files mapped included. A line of JSON a case.
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
from mka.config import LongTermConfig
from mka.memory.places import LongTerm
from mka.training.memory import resident_bytes

NUM_KV_HEADS = 2


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure."""

    stores: tuple[str, ...] = ("disk", "host", "device")
    lengths: tuple[int, ...] = (131072, 262144, 524288, 1048576)
    kind: str = "mka"
    piece: int = 4096


def main(options: Options) -> None:
    for store in options.stores:
        for tokens in options.lengths:
            case = [sys.executable, __file__, "--stores", store, "--lengths", str(tokens), "--kind", options.kind]
            alone = [*case, "--piece", str(options.piece), "--alone"]
            subprocess.run(alone, check=True)  # noqa: S603


@torch.no_grad()
def read(store: str, tokens: int, kind: str, piece: int) -> None:
    torch.manual_seed(0)
    attn = layer(kind, torch.bfloat16, NUM_KV_HEADS)
    config = LongTermConfig(longterm_store=store)  # pyright: ignore[reportArgumentType] (checked there)
    state = attn.initial_state(1, longterm=LongTerm.of(config))
    x = torch.randn(1, piece, HIDDEN_SIZE, dtype=torch.bfloat16)
    attn(x, state=attn.initial_state(1))  # the libraries' own memory stands before
    Path("/proc/self/clear_refs").write_text("5")
    before, begun = resident_bytes("VmRSS"), time.perf_counter()
    for start in range(0, tokens, piece):
        attn(torch.randn(1, min(piece, tokens - start), HIDDEN_SIZE, dtype=torch.bfloat16), state=state)
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
    if "--alone" in sys.argv:
        alone = tyro.cli(Options, args=[word for word in sys.argv[1:] if word != "--alone"], use_underscores=True)
        read(alone.stores[0], alone.lengths[0], alone.kind, alone.piece)
    else:
        main(tyro.cli(Options, description=__doc__, use_underscores=True))
