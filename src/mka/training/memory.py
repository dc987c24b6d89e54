"""Peak memory of one mechanism, unmixed with those before it.

CUDA: the allocator's own peaks, reset at the start. CPU (Linux): freed memory is handed back to the system and the
kernel's high-water mark of the process is reset, so that the peak above the start is what was needed since.
"""

import ctypes
import gc
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
RESET_PEAK = "5"
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class Peak:
    """Bytes above the start, and in all. CUDA: peak allocated, peak reserved. CPU: peak resident. None: unknown."""

    allocated: int | None
    reserved: int | None


class PeakMemory:
    """Starts measuring when made; `peak()` is the highest since then."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device)
        elif can_reset_peak():
            ctypes.CDLL(None).malloc_trim(0)
            CLEAR_REFS.write_text(RESET_PEAK)
            self.start = resident_bytes("VmRSS")

    def peak(self) -> Peak:
        if self.device.type == "cuda":
            allocated = torch.cuda.max_memory_allocated(self.device) - self.start
            return Peak(allocated, torch.cuda.max_memory_reserved(self.device))
        if not can_reset_peak():
            return Peak(None, None)
        highest = resident_bytes("VmHWM")
        return Peak(highest - self.start, highest)


def can_reset_peak() -> bool:
    """Linux with glibc, where the process may; elsewhere the figure is left out rather than guessed."""
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        return False
    try:
        CLEAR_REFS.open("w").close()
    except OSError:
        return False
    return True


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (highest since the reset) of this process."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {field}")


def keep_freed_memory() -> None:
    """Let glibc reuse large freed blocks instead of handing each back to the kernel and faulting it in again."""
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
