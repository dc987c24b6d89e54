"""The mechanisms that are compared, one row each. No torch here.

A row is all that is known of a mechanism outside its own file; everything else is
derived from it (flags, help texts, colors, what can be converted) or asked of the
class.
"""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Mechanism:
    """One row of the table.

    Args:
        title: its name in reports.
        class_path: "module:Class", a subclass of `mka.attention.CausalAttention`.
        flags: the flags of `mka bench` that set an option of the class, and
            `memory_layers` if a model can have it in some layers only. A flag has the
            name of its option, except for `OPTION_NAMES`.
        color: its color on white, in hexadecimal; `color_dark` is that on black.
        marker: the shape of its points: circle, square, cross, diamond, triangle-up,
            triangle-down, triangle-left or triangle-right.
        is_convertible: whether a pretrained model can be converted to it (`mka
            convert`): it needs the keys and values of heads.
    """

    title: str
    class_path: str
    flags: tuple[str, ...]
    color: str
    color_dark: str
    marker: str
    is_convertible: bool

    @property
    def has_memory(self) -> bool:
        """Whether it reads beyond its window, so that a model needs it in some layers
        only."""
        return "memory_layers" in self.flags


WINDOW = ("local_window", "sink_tokens")
MEMORIES = ("chunk_size", "top_k", "session_decay")
OPTION_NAMES = {"num_groups": "num_kv_heads"}
"""For each flag whose option has another name: that name."""

# The order is that of tables, legends and help texts. After Okabe and Ito's palette,
# which most color-blind readers tell apart; yellow is left out, too pale on white.
MECHANISMS: dict[str, Mechanism] = {
    "mha": Mechanism(
        title="Multi-Head Attention",
        class_path="mka.attention.gqa:MultiHeadAttention",
        flags=WINDOW,
        color="#111111",
        color_dark="#f4f4f4",
        marker="circle",
        is_convertible=True,
    ),
    "mqa": Mechanism(
        title="Multi-Query Attention",
        class_path="mka.attention.gqa:MultiQueryAttention",
        flags=WINDOW,
        color="#2a8fc4",
        color_dark="#6cc4f0",
        marker="triangle-down",
        is_convertible=True,
    ),
    "gqa": Mechanism(
        title="Grouped-Query Attention",
        class_path="mka.attention.gqa:GroupedQueryAttention",
        flags=(*WINDOW, "num_groups"),
        color="#00835f",
        color_dark="#2fc79b",
        marker="square",
        is_convertible=True,
    ),
    "mla": Mechanism(
        title="Multi-Head Latent Attention",
        class_path="mka.attention.mla:MultiHeadLatentAttention",
        flags=WINDOW,
        color="#b4558f",
        color_dark="#e39cc6",
        marker="diamond",
        is_convertible=False,
    ),
    "mka": Mechanism(
        title="Memorized Key Attention",
        class_path="mka.attention.mka:MemoryKeyedAttention",
        flags=(
            *(*WINDOW, *MEMORIES, "mix", "longterm_positions", "session_stride", "session_slots"),
            "memory_layers",
        ),
        color="#c44e00",
        color_dark="#ff8a4a",
        marker="triangle-up",
        is_convertible=True,
    ),
    "fmka": Mechanism(
        title="Fast Memorized Key Attention",
        class_path="mka.attention.fmka:FastMemoryKeyedAttention",
        flags=(*WINDOW, *MEMORIES, "memory_layers"),
        color="#0060a8",
        color_dark="#7fb6ff",
        marker="cross",
        is_convertible=True,
    ),
}
# The names below follow from the rows, so that a new mechanism needs only a row here.
CONVERTIBLE = tuple(name for name, row in MECHANISMS.items() if row.is_convertible)
"""Mechanisms that a pretrained model can be converted to."""
WITH_MEMORY = tuple(name for name, row in MECHANISMS.items() if row.has_memory)
"""Mechanisms that a model can have in some layers only."""
OPTION_FLAGS = tuple(dict.fromkeys(flag for row in MECHANISMS.values() for flag in row.flags))
"""All flags that set an option of some mechanism."""


def listed(names: tuple[str, ...], last: str) -> str:
    """Names joined as in a sentence: "a, b and c" with `last` "and"."""
    return f"{', '.join(names[:-1])} {last} {names[-1]}" if len(names) > 1 else "".join(names)
