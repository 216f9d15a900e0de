"""Bidirectional methods: a server holds the model, every worker a point of its own, and both directions are compressed.

Inkheart SGD and M4 are reconstructions of ours from their paper's abstract; see `inkheart` and `m4`.
"""

from __future__ import annotations

from .base import Method
from .config import METHODS
from .inkheart import InkheartSGD
from .ledger import Clock, LinkLedger
from .m3 import M3
from .m4 import M4
from .marina_p import MarinaP
from .optimizer import BidirectionalOptimizer
from .permk import PermK
from .problem import Problem
from .randk import RandK
from .simulation import BidirectionalSimulation

__all__ = [
    "M3",
    "M4",
    "METHODS",
    "BidirectionalOptimizer",
    "BidirectionalSimulation",
    "Clock",
    "InkheartSGD",
    "LinkLedger",
    "MarinaP",
    "Method",
    "PermK",
    "Problem",
    "RandK",
]
