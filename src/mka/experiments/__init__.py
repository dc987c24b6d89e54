"""Studies: configuration -> results.jsonl."""

from mka.experiments.benchmark import run_benchmark

__all__ = ["run_benchmark"]
