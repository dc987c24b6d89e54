"""How well a model predicts held-out text and recalls from long text, and what its
router does.

The functions take a model and return dataclasses, which `mka eval` prints.
`mka.evaluate` is a short name for this package.
"""

from mka.evaluation.held_out import HeldOutLoss, held_out_loss
from mka.evaluation.recall import Score, needle_scores, recall_scores
from mka.evaluation.router import LayerRouting, knock_outs, layer_routings, routing_of, text_rows
from mka.evaluation.ruler import RulerScore, ruler_scores
from mka.evaluation.text import Perplexity, perplexity, text_perplexity

__all__ = [
    "HeldOutLoss",
    "LayerRouting",
    "Perplexity",
    "RulerScore",
    "Score",
    "held_out_loss",
    "knock_outs",
    "layer_routings",
    "needle_scores",
    "perplexity",
    "recall_scores",
    "routing_of",
    "ruler_scores",
    "text_perplexity",
    "text_rows",
]
