"""Optimizers whose state lives in the projected space of GaLore or GoLore. The module
`optimizer` describes a step.
"""

from __future__ import annotations

from lowrank_comm.projected.adamw import ProjectedAdamW
from lowrank_comm.projected.sgd import ProjectedSGD

__all__ = ["ProjectedAdamW", "ProjectedSGD"]
