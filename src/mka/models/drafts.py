"""How many tokens a cache must be able to take back while drafts are checked.

Assisted decoding proposes a draft, lets the model read it, and takes back what the model
would not have written. A bounded state can only take back as many tokens as it was made
for, so a cache is made for the longest draft.
"""

from math import isqrt
from typing import Any

from transformers import Cache

from mka.errors import InputError
from mka.models.cache import REVERSIBLE, StateLayer

USUAL_DRAFT = 20
"""Tokens per draft where no configuration says it, as in transformers."""
GROWING = ("heuristic", "heuristic_transient")
"""Schedules of transformers that lengthen a draft by 2 after each that was right."""


def longest_draft(model: Any, kwargs: dict[str, Any]) -> int:
    """The most tokens that a draft can have in a call of `generate`; 0 without drafts.

    Args:
        model: whose `generate` is called: the model that checks drafts, or the one that
            writes them.
        kwargs: of the call.
    """
    config = kwargs.get("generation_config") or model.generation_config

    def option(name: str) -> Any:
        """An option of the call, or else of its configuration."""
        return kwargs[name] if kwargs.get(name) is not None else getattr(config, name, None)

    assistant = kwargs.get("assistant_model")
    if getattr(config, "is_assistant", False) or option("assistant_early_exit"):
        assistant = model
    if assistant is None:
        return option("prompt_lookup_num_tokens") or 0
    drafts = assistant.generation_config
    size = int(getattr(drafts, "num_assistant_tokens", None) or USUAL_DRAFT)
    if getattr(drafts, "num_assistant_tokens_schedule", None) in GROWING:
        # After n drafts that were right, n * n tokens are written at least, so a draft
        # grows at most 2 * sqrt(tokens) longer.
        written = option("max_new_tokens") or option("max_length") or USUAL_DRAFT
        size += 2 * (isqrt(int(written)) + 1)
    return size


def needed_reversible(model: Any, cache: Cache | None, kwargs: dict[str, Any]) -> int:
    """The `reversible` of the caches that a call of `generate` makes.

    cache: the one that is given; None: one is made. Raises InputError if the given one
    cannot take back the call's longest draft.
    """
    # One more than the draft: the token that the model itself wrote after it.
    needed = max(REVERSIBLE, longest_draft(model, kwargs) + 1)
    for layer in getattr(cache, "layers", ()):
        if isinstance(layer, StateLayer) and layer.reversible < needed and layer.is_bounded:
            raise InputError(
                f"drafts have up to {needed - 1} tokens, and the cache was made with reversible="
                f"{layer.reversible}; give memory_cache(model, ..., reversible={needed})"
            )
    return needed
