"""The memory meter: what came before it does not show, what comes during it does."""

import pytest
import torch

import checks_training
from checks_training import CPU, MEBIBYTE
from mka.training import Peak, PeakMemory, keep_freed_memory, memory

needs_reset = pytest.mark.skipif(
    not memory.can_reset_peak(), reason="no /proc/self/clear_refs or no glibc here"
)


@needs_reset
def test_an_earlier_peak_does_not_show() -> None:
    checks_training.assert_earlier_memory_does_not_show()


@needs_reset
def test_it_does_not_show_either_where_freed_memory_is_kept() -> None:
    # As in the benchmark: glibc keeps what is freed, and the meter has to hand it back.
    keep_freed_memory()
    checks_training.assert_earlier_memory_does_not_show()


@needs_reset
def test_what_is_held_since_before_is_not_counted() -> None:
    held = torch.ones(128 * MEBIBYTE, dtype=torch.uint8)
    peak = PeakMemory(CPU).peak()
    assert peak.allocated is not None
    assert peak.reserved is not None
    assert peak.allocated < 16 * MEBIBYTE
    assert peak.reserved > held.numel()


@needs_reset
def test_the_highest_counts_not_the_last() -> None:
    meter = PeakMemory(CPU)
    for size in (32, 96, 16):
        torch.ones(size * MEBIBYTE, dtype=torch.uint8)
    allocated = meter.peak().allocated
    assert allocated is not None
    assert allocated > 90 * MEBIBYTE


def test_where_the_peak_cannot_be_reset_no_figure_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "can_reset_peak", lambda: False)
    assert PeakMemory(CPU).peak() == Peak(None, None)


def test_cuda_peaks_are_reset_and_read_from_the_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    for name, value in {
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 7,
        "max_memory_reserved": 9,
    }.items():
        monkeypatch.setattr(
            torch.cuda, name, lambda *args, n=name, v=value: (called.append(n), v)[1]
        )
    assert PeakMemory(torch.device("cuda")).peak() == Peak(7, 9)
    assert called == [
        "empty_cache",
        "reset_peak_memory_stats",
        "max_memory_allocated",
        "max_memory_reserved",
    ]


def test_an_unknown_field_is_an_error() -> None:
    if not memory.STATUS.exists():
        pytest.skip("no /proc/self/status here")
    assert memory.resident_bytes("VmHWM") > 0
    with pytest.raises(RuntimeError, match="no VmNone"):
        memory.resident_bytes("VmNone")
