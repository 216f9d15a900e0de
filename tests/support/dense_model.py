"""A model with an embedding."""

from __future__ import annotations

from typing import Any

from lowrank_comm import PowerSGD, Rule
from lowrank_comm.simulation import Simulation

MODEL = {
    "embed": (300, 40),
    "a": (80, 64),
    "b": (64, 80),
    "norm": (512,),
    "bias": (64,),
    "scale": (),
}


def dense_embedding(**more: Any) -> Simulation:
    return Simulation(
        MODEL, PowerSGD(rank=2), 2, rules=(Rule("embed", min_compression_rate=1e9),), **more
    )
