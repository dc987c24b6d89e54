"""States whose long-term memory is kept in every way."""

from typing import Any

from mka.attention import CausalAttention
from mka.memory.options import LongTermConfig
from mka.memory.places import LongTerm
from mka.memory.state import State


def state_of(attn: CausalAttention, rows: int, store: Any, **options: Any) -> State:
    config = LongTermConfig(longterm_store=store)
    return attn.initial_state(rows, longterm=LongTerm.of(config), **options)
