"""Perplexity and bits per byte on held-out text."""

from mka.evaluation.perplexity import HeldOutLoss, held_out_loss

__all__ = ["HeldOutLoss", "held_out_loss"]
