"""The error for a mistake in the user's input, and the checks that raise it. No torch
here."""

import difflib
from collections.abc import Iterable
from typing import Any


class InputError(ValueError):
    """A mistake in the user's input.

    Its message is one line: which option, which value, and what is allowed.
    """


def unknown_name(what: str, value: str, allowed: Iterable[str]) -> InputError:
    """The error for a name that is not allowed; it lists the allowed names and the
    nearest one."""
    names = list(allowed)
    return InputError(
        f"unknown {what} {value!r}; allowed: {', '.join(names)}; nearest: {nearest(value, names)!r}"
    )


def nearest(value: str, names: Iterable[str]) -> str:
    """The name most like `value`. Raises ValueError if there are no names."""

    def likeness(name: str) -> float:
        """Twice the usual likeness: of the words, and of their sorted letters."""
        # Sorted letters, because the right letters in the wrong order are nearly right.
        given = value.lower()
        pairs = (given, name), ("".join(sorted(given)), "".join(sorted(name)))
        return sum(difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs)

    return max(names, key=likeness)


MOST = 2**63 - 1
"""The largest whole number that any option takes: what 64 bits hold."""


def check_at_least(name: str, value: float | None, least: float) -> None:
    """Raise InputError, naming the option, if its value is below `least`, or a whole
    number beyond 64 bits; None is allowed."""
    if isinstance(value, int) and value > MOST:
        raise InputError(f"{name} is {value}; it must be at most 2**63 - 1")
    # Not "value < least": a comparison with NaN is always False.
    if value is not None and not value >= least:
        raise InputError(f"{name} is {value}; it must be at least {least}")


def check_whole(name: str, value: Any, least: int | None = None) -> None:
    """Raise InputError unless the value is None or a whole number of at least
    `least`."""
    # In Python True and False are ints; as a number they would be a mistake.
    if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
        raise InputError(f"{name} is {value!r}; it must be a whole number")
    if least is not None:
        check_at_least(name, value, least)


def check_utf8(name: str, value: str | None) -> None:
    """Raise InputError unless the value is None or text that UTF-8 can hold.

    Bytes of an argument or a path that are not UTF-8 arrive as half surrogate pairs.
    """
    try:
        (value or "").encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{name} is not UTF-8 (character {error.start}); give UTF-8 text"
        ) from None


def check_heads(
    hidden_size: int, num_heads: int, num_kv_heads: int, kv_option: str = "num_kv_heads"
) -> None:
    """Raise InputError, listing the divisors, unless the numbers of heads fit the
    width.

    num_heads must divide hidden_size, and num_kv_heads (the option called `kv_option`)
    must divide num_heads.
    """
    check_whole("hidden_size", hidden_size, 1)
    check_whole("num_heads", num_heads, 1)
    if hidden_size % num_heads:
        raise InputError(
            f"num_heads is {num_heads}; it must divide hidden_size {hidden_size}: "
            f"{divisors(hidden_size)}"
        )
    check_whole(kv_option, num_kv_heads)
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise InputError(
            f"{kv_option} is {num_kv_heads}; it must divide the {num_heads} heads: "
            f"{divisors(num_heads)}"
        )


def divisors(number: int) -> str:
    """All divisors of a positive number, as a list for a message: "1, 2, 4"."""
    return ", ".join(str(d) for d in range(1, number + 1) if number % d == 0)


def printable(text: str) -> str:
    """The text with control characters, direction marks and the like as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)
