"""Limits of what a mechanism takes, and the one-line error for what lies outside them. No torch here."""

import difflib
from collections.abc import Iterable
from typing import Any, Literal

Mix = Literal["joint", "routed"]
MIXES: tuple[Mix, ...] = ("joint", "routed")
LongTermPositions = Literal["true", "clamped", "none"]
LONGTERM_POSITIONS: tuple[LongTermPositions, ...] = ("true", "clamped", "none")
LOCAL_WINDOW = 128
"""Of mka and fmka, in tokens, where nothing else is said."""
SINK_TOKENS = 4
"""Attention sinks where nothing else is said."""
SessionDecay = float | Literal["learned"] | None


class InputError(ValueError):
    """A mistake in what the user gave. Its message is one line: what, which value, what is allowed."""


def unknown_name(what: str, value: str, allowed: Iterable[str]) -> InputError:
    """The error for a name that is not in a list: names the list and the nearest entry."""
    names = list(allowed)
    return InputError(f"unknown {what} {value!r}; allowed: {', '.join(names)}; nearest: {nearest(value, names)!r}")


def nearest(value: str, names: Iterable[str]) -> str:
    """The name most like `value`; the right letters in the wrong order are nearly right."""

    def likeness(name: str) -> float:
        given = value.lower()
        pairs = (given, name), ("".join(sorted(given)), "".join(sorted(name)))
        return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return max(names, key=likeness)


def check_at_least(name: str, value: float | None, least: float) -> None:
    if value is not None and not value >= least:
        raise InputError(f"{name} is {value}; it must be at least {least}")


def check_whole(name: str, value: Any, least: int | None = None) -> None:
    """None, or a whole number that is not too small; True and False are no numbers here."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise InputError(f"{name} is {value!r}; it must be a whole number")
    if least is not None:
        check_at_least(name, value, least)


def check_sinks(local_window: int | None, sink_tokens: int | None) -> int:
    """How many sinks there are: those that were asked for, or 4, or as many as fit; without a window there are none."""
    if sink_tokens is None:
        return 0 if local_window is None else min(SINK_TOKENS, local_window - 1)
    check_whole("sink_tokens", sink_tokens, 0)
    if sink_tokens and (local_window is None or sink_tokens >= local_window):
        where = "there is no local_window" if local_window is None else f"local_window is {local_window}"
        raise InputError(
            f"sink_tokens is {sink_tokens}; {where}; sinks need a window that is larger than they are, or 0"
        )
    return sink_tokens


def check_distance(local_window: int | None, sinks: int, max_distance: int | None) -> int | None:
    """A distance that no window reaches: within one, keys stand where they are."""
    check_whole("max_distance", max_distance)
    if max_distance is not None:
        least = (local_window or 0) + sinks
        if max_distance < max(1, least):
            raise InputError(
                f"max_distance is {max_distance}; it must be at least local_window and sink_tokens together, {least}"
            )
    return max_distance


def check_heads(hidden_size: int, num_heads: int, num_kv_heads: int, kv_option: str = "num_kv_heads") -> None:
    """H must divide C, and G (called `kv_option`) must divide H; otherwise an InputError that lists the divisors."""
    check_whole("hidden_size", hidden_size, 1)
    check_whole("num_heads", num_heads, 1)
    if hidden_size % num_heads:
        raise InputError(f"num_heads is {num_heads}; it must divide hidden_size {hidden_size}: {divisors(hidden_size)}")
    check_whole(kv_option, num_kv_heads)
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise InputError(f"{kv_option} is {num_kv_heads}; it must divide the {num_heads} heads: {divisors(num_heads)}")


def check_memory(
    local_window: int | None,
    chunk_size: int,
    top_k: int,
    session_decay: SessionDecay,
    session_stride: int = 1,
    session_slots: int | None = None,
) -> None:
    """Limits of the three memory levels; raises InputError."""
    check_whole("local_window", local_window, 1)
    check_whole("chunk_size", chunk_size, 1)
    check_whole("top_k", top_k, 0)
    check_whole("session_stride", session_stride, 1)
    check_whole("session_slots", session_slots, 1)
    if session_decay not in ("learned", None) and not (isinstance(session_decay, float) and 0 < session_decay < 1):
        raise InputError(f"session_decay is {session_decay!r}; it must be 'learned', None or between 0 and 1")


def divisors(number: int) -> str:
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)
