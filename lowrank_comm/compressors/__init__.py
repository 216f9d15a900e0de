"""One algorithm a file, in the papers' symbols; the registry of names for configuration files.

A compressor asks for averages and never sees a process: `base` tells the protocol.
"""

from __future__ import annotations

from .acp import Acp
from .atomo import Atomo
from .base import Compressor, Context, LowRank, Result
from .galore import GaLore
from .golore import GoLore
from .greedylore import GreedyLore
from .identity import Identity
from .powersgd import PowerSGD
from .powersgd_plus import PowerSGDPlus
from .random_projection import RandomProjection

REGISTRY: dict[str, type[Compressor]] = {
    cls.json_name: cls
    for cls in (PowerSGD, PowerSGDPlus, Acp, GreedyLore, GaLore, GoLore, Atomo, RandomProjection, Identity)
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
