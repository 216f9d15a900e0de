"""The optimizer that users wrap around their own, and its parts: one idea a file."""

from .compressed import CompressedOptimizer

__all__ = ["CompressedOptimizer"]
