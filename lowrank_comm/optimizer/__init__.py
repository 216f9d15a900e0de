"""`CompressedOptimizer`, which wraps a torch optimizer, and its parts."""

from .compressed import CompressedOptimizer

__all__ = ["CompressedOptimizer"]
