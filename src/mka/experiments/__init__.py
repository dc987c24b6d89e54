"""Studies: configuration -> results.jsonl."""

from mka.experiments.benchmark import run_benchmark
from mka.experiments.original import audit_original

__all__ = ["audit_original", "run_benchmark"]
