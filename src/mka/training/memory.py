"""Peak memory of one mechanism, without that of the mechanisms before it.

CUDA: the allocator's own peaks, which are reset at the start. CPU (Linux): freed memory
is returned to the system and the kernel's high-water mark of the process is reset, so
that the peak above the start is what was needed since.
"""

import ctypes
import gc
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")
# From proc(5): 5 resets the process's peak resident set size.
RESET_PEAK = "5"
# Option numbers of glibc's mallopt, from its malloc.h.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


@dataclass(frozen=True)
class Peak:
    """Peak memory in bytes; None where it cannot be measured.

    Attributes:
        allocated: the peak above the start: allocated on CUDA, resident on the CPU.
        reserved: the peak in total: reserved by the allocator on CUDA, resident on the
            CPU.
    """

    allocated: int | None
    reserved: int | None


class PeakMemory:
    """Measures peak memory from its creation on; `peak()` is the highest value since
    then."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device)
        elif can_reset_peak():
            # Memory that glibc keeps after it was freed would hide what is needed from
            # now on.
            ctypes.CDLL(None).malloc_trim(0)
            CLEAR_REFS.write_text(RESET_PEAK)
            self.start = resident_bytes("VmRSS")

    def peak(self) -> Peak:
        """The peak since the start."""
        if self.device.type == "cuda":
            allocated = torch.cuda.max_memory_allocated(self.device) - self.start
            return Peak(allocated, torch.cuda.max_memory_reserved(self.device))
        if not can_reset_peak():
            return Peak(None, None)
        highest = resident_bytes("VmHWM")
        return Peak(highest - self.start, highest)


def can_reset_peak() -> bool:
    """Whether this process may reset its peak memory: on Linux with glibc, if
    permitted."""
    if sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "malloc_trim"):
        return False
    try:
        CLEAR_REFS.open("w").close()
    except OSError:
        return False
    return True


def resident_bytes(field: str) -> int:
    """Resident bytes of this process: VmRSS (now) or VmHWM (the highest since the
    reset).

    Raises RuntimeError if the kernel does not report the field.
    """
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{STATUS} has no {field}")


def keep_freed_memory() -> None:
    """Let glibc reuse large freed blocks instead of returning each of them to the
    kernel."""
    # By default each large tensor would be mapped and faulted in again, page by page.
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
