"""MKA: attention with three memories, and an honest comparison of attention mechanisms.

    import mka

    attn = mka.build_attention("mka", hidden_size=256, num_heads=4)
    model = mka.convert(pretrained, "mka", local_window=256)
    mka.evaluate.perplexity(model, tokens).loss
    [*mka.audit.audit_module(attn, 256)]

Each name is loaded when it is first used: `import mka` loads neither torch nor
transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mka.moved import remember

if TYPE_CHECKING:
    from mka import audit
    from mka import evaluation as evaluate
    from mka.attention import build_attention
    from mka.models import build_model, convert
    from mka.models.loading import load

__version__ = "0.1.0"
__all__ = ["audit", "build_attention", "build_model", "convert", "evaluate", "load"]

FACE = {
    "audit": "mka.audit",
    "build_attention": "mka.attention:build_attention",
    "build_model": "mka.models:build_model",
    "convert": "mka.models:convert",
    "evaluate": "mka.evaluation",
    "load": "mka.models.loading:load",
}
"""The public names, and where they are."""


def __getattr__(name: str) -> Any:
    """A public name, loaded now."""
    if name not in FACE:
        raise AttributeError(f"module 'mka' has no attribute {name!r}")
    module, _, attribute = FACE[name].partition(":")
    found = import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    """The public names too."""
    return sorted({*globals(), *FACE})


remember()
