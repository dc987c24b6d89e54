"""Studies: configuration -> results.jsonl; and adaptations of converted models."""

from mka.experiments.adapting import adapt_model
from mka.experiments.benchmark import run_benchmark
from mka.experiments.original import audit_original

__all__ = ["adapt_model", "audit_original", "run_benchmark"]
