"""Options of the three memories: names, defaults and limits, each of them once. No
torch here.

The mechanisms, the benchmark's flags, `mka convert` and their help texts take them from
here.
"""

from dataclasses import dataclass
from typing import Literal

from mka.errors import InputError, check_whole, unknown_name

Mix = Literal["joint", "routed"]
MIXES: tuple[Mix, ...] = ("joint", "routed")
LongTermPositions = Literal["true", "clamped", "none"]
LONGTERM_POSITIONS: tuple[LongTermPositions, ...] = ("true", "clamped", "none")
SessionDecay = float | Literal["learned"] | None
LongTermStore = Literal["device", "host", "disk"]
STORES: tuple[LongTermStore, ...] = ("device", "host", "disk")

# One order everywhere: local, session, long-term, as in the router's logits.
LEVELS = ("L1", "L2", "L3")
LEVEL_WORDS = ("local", "session", "long-term")
LEVEL_TITLES = ("L1, the window", "L2, the session", "L3, retrieved chunks")

LOCAL_WINDOW = 128
"""Tokens in the window of mka and fmka, the current one included."""
SINK_TOKENS = 4
"""First tokens of a row that every later token sees, if the window is larger than their
number."""
MIX: Mix = "joint"
CHUNK_SIZE = 16
"""Tokens per long-term chunk."""
TOP_K = 4
"""Long-term chunks retrieved per token."""
POSITIONS: LongTermPositions = "true"
SESSION_DECAY: SessionDecay = "learned"
SESSION_STRIDE = 16
"""Tokens per session slot of mka."""
SESSION_SLOTS = 256
"""How many of the latest session slots mka attends to."""


def check_memory(
    local_window: int | None,
    chunk_size: int,
    top_k: int,
    session_decay: SessionDecay,
    session_stride: int = 1,
    session_slots: int | None = None,
) -> None:
    """Check the options of the three memory levels.

    local_window (None: the whole past) and chunk_size are in tokens, top_k in chunks
    per token, session_stride in tokens per slot, session_slots (None: all) in slots;
    session_decay None means no session level. Raises InputError for a value that is out
    of range.
    """
    check_whole("local_window", local_window, 1)
    check_whole("chunk_size", chunk_size, 1)
    check_whole("top_k", top_k, 0)
    check_whole("session_stride", session_stride, 1)
    check_whole("session_slots", session_slots, 1)
    # NaN fails the comparison, and so is refused too.
    if session_decay not in ("learned", None) and not (
        isinstance(session_decay, float) and 0 < session_decay < 1
    ):
        raise InputError(
            f"session_decay is {session_decay!r}; it must be 'learned', None or between 0 and 1"
        )


def check_sinks(local_window: int | None, sink_tokens: int | None) -> int:
    """The number of sinks: `sink_tokens`, or by default 4, or fewer if the window is
    small.

    Without a window there are none. Raises InputError unless the window is larger than
    that.
    """
    # A default adapts to the window; a number that was asked for is refused if it does
    # not fit.
    if sink_tokens is None:
        return 0 if local_window is None else min(SINK_TOKENS, local_window - 1)
    check_whole("sink_tokens", sink_tokens, 0)
    if sink_tokens and (local_window is None or sink_tokens >= local_window):
        where = (
            "there is no local_window"
            if local_window is None
            else f"local_window is {local_window}"
        )
        raise InputError(
            f"sink_tokens is {sink_tokens}; {where}; sinks need a window that is larger than "
            "their number; 0 switches them off"
        )
    return sink_tokens


def check_distance(local_window: int | None, sinks: int, max_distance: int | None) -> int | None:
    """`max_distance`, in tokens, as given (None: no limit).

    Raises InputError if it is smaller than local_window and the sinks together.
    """
    # Keys in a window are always at their true distance, so no window may reach beyond
    # the limit.
    check_whole("max_distance", max_distance)
    if max_distance is not None:
        least = (local_window or 0) + sinks
        if max_distance < max(1, least):
            raise InputError(
                f"max_distance is {max_distance}; it must be at least local_window and "
                f"sink_tokens together, {least}"
            )
    return max_distance


@dataclass(frozen=True, kw_only=True)
class LongTermConfig:
    """Where a model keeps its long-term memory while it reads."""

    longterm_store: Literal["device", "host", "disk"] = "device"
    """Where mka and fmka keep the chunks that they retrieve: on the device, in host
    memory, or in a memory-mapped file."""
    longterm_folder: str | None = None
    """Directory for the file (its name is removed at once, and its space is freed when
    the process ends); default: the system's temporary directory."""
    longterm_gib: float | None = None
    """Limit on host memory or file size, in GiB, for all layers together; default: no
    limit."""

    def __post_init__(self) -> None:
        if self.longterm_store not in STORES:
            raise unknown_name("longterm_store", self.longterm_store, STORES)
        # Written so that NaN is refused too.
        if self.longterm_gib is not None and not 0 < self.longterm_gib < float("inf"):
            raise InputError(f"longterm_gib is {self.longterm_gib}; it must be above 0")
        # An option that would be ignored is refused: whoever gave it expects an effect.
        if self.longterm_folder is not None and self.longterm_store != "disk":
            raise InputError(
                f"longterm_folder is {self.longterm_folder!r}; it is for longterm_store disk"
            )
        if self.longterm_gib is not None and self.longterm_store == "device":
            raise InputError(
                f"longterm_gib is {self.longterm_gib}; it is for longterm_store host or disk"
            )

    @property
    def is_special(self) -> bool:
        """Whether anything is not the default."""
        # The other options are only allowed with a store that is not the default.
        return self.longterm_store != "device"
