"""Comparisons of mechanisms (configuration -> results.jsonl), and adaptations of
models."""

from mka.experiments.adapting import adapt_model
from mka.experiments.benchmark import run_benchmark

__all__ = ["adapt_model", "run_benchmark"]
