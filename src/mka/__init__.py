"""MKA: attention with three memories, and an honest comparison of attention mechanisms."""

__version__ = "0.1.0"
