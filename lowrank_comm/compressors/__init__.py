"""Compressors, one algorithm a file, in the papers' symbols; and their registry by the
names of configuration files.

A compressor asks for averages over the workers and never sees a process group: `base`
tells the protocol, README.md how to add one.
"""

from __future__ import annotations

from lowrank_comm.compressors.acp import Acp
from lowrank_comm.compressors.atomo import Atomo
from lowrank_comm.compressors.base import Compressor, Context, LowRank, Result
from lowrank_comm.compressors.galore import GaLore
from lowrank_comm.compressors.golore import GoLore
from lowrank_comm.compressors.greedylore import GreedyLore
from lowrank_comm.compressors.identity import Identity
from lowrank_comm.compressors.powersgd import PowerSGD
from lowrank_comm.compressors.powersgd_plus import PowerSGDPlus
from lowrank_comm.compressors.random_projection import RandomProjection

REGISTRY: dict[str, type[Compressor]] = {
    cls.json_name: cls
    for cls in (
        PowerSGD,
        PowerSGDPlus,
        Acp,
        GreedyLore,
        GaLore,
        GoLore,
        Atomo,
        RandomProjection,
        Identity,
    )
}

__all__ = [
    "REGISTRY",
    "Acp",
    "Atomo",
    "Compressor",
    "Context",
    "GaLore",
    "GoLore",
    "GreedyLore",
    "Identity",
    "LowRank",
    "PowerSGD",
    "PowerSGDPlus",
    "RandomProjection",
    "Result",
]
