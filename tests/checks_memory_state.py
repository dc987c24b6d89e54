"""States whose long-term memory is kept and searched in every way."""

from typing import Any

from mka.attention import CausalAttention
from mka.config import LongTermConfig
from mka.memory.places import LongTerm
from mka.memory.state import State


def state_of(attn: CausalAttention, rows: int, store: Any, find: Any, **options: Any) -> State:
    config = LongTermConfig(longterm_store=store, longterm_search=find)
    return attn.initial_state(rows, longterm=LongTerm.of(config), **options)
