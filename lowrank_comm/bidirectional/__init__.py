"""Bidirectional methods: a server holds the model, every worker a point of its own, and
both directions are compressed.

Inkheart SGD and M4 are reconstructions of ours from their paper's abstract (Begunov
and Tyurin, arXiv 2605.07795); see `inkheart` and `m4`.
"""

from __future__ import annotations

from lowrank_comm.bidirectional.base import Method
from lowrank_comm.bidirectional.config import METHODS
from lowrank_comm.bidirectional.inkheart import InkheartSGD
from lowrank_comm.bidirectional.ledger import Clock, LinkLedger
from lowrank_comm.bidirectional.m3 import M3
from lowrank_comm.bidirectional.m4 import M4
from lowrank_comm.bidirectional.marina_p import MarinaP
from lowrank_comm.bidirectional.optimizer import BidirectionalOptimizer
from lowrank_comm.bidirectional.permk import PermK
from lowrank_comm.bidirectional.problem import Problem
from lowrank_comm.bidirectional.randk import RandK
from lowrank_comm.bidirectional.simulation import BidirectionalSimulation

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
