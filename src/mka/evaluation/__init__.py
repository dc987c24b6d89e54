"""Perplexity and bits per byte on held-out text; what a model finds again in a long one; what a module leaks."""

from mka.evaluation.leaks import audit_module
from mka.evaluation.perplexity import HeldOutLoss, held_out_loss
from mka.evaluation.recall import Score, score
from mka.evaluation.router import routing_of, score_router
from mka.evaluation.ruler import score_ruler
from mka.evaluation.text import score_text

__all__ = [
    "HeldOutLoss",
    "Score",
    "audit_module",
    "held_out_loss",
    "routing_of",
    "score",
    "score_router",
    "score_ruler",
    "score_text",
]
