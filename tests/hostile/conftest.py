"""The fixtures of tiny runs."""

from tiny_runs import place, tiny_place

__all__ = ["place", "tiny_place"]
