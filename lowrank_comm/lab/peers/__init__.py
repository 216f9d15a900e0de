"""Methods of others, for comparison in the lab only: one file each, written from its
paper and public code and not copied from it.

Each has settings that a preset names by `kind`, and a class that carries the method out
for N workers in one process (`training.workers.Peer`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field
from torch import Tensor

from lowrank_comm.lab.peers.demo import DeMo, DeMoSettings
from lowrank_comm.lab.peers.dion import Dion, DionSettings
from lowrank_comm.lab.peers.greedylore_reference import (
    GreedyLoreReference,
    GreedyLoreReferenceSettings,
)
from lowrank_comm.lab.peers.one_bit_adam import OneBitAdam, OneBitAdamSettings
from lowrank_comm.lab.peers.sparse import Sparse, SparseSettings
from lowrank_comm.lab.training.bases import Base
from lowrank_comm.lab.training.workers import Peer

PeerSettings = Annotated[
    DeMoSettings | DionSettings | GreedyLoreReferenceSettings | OneBitAdamSettings | SparseSettings,
    Field(discriminator="kind"),
]


def start(
    settings: PeerSettings,
    parameters: Mapping[str, Tensor],
    workers: int,
    base: Base,
    dense_rate: float,
    seed: int,
) -> Peer:
    """Return a peer at its first step.

    Args:
        settings: which, and how.
        parameters: name -> parameter that it trains.
        workers: N.
        base: the optimizer that it replaces or uses.
        dense_rate: learning rate of uncompressed training, for what a peer does not
            compress but steps by itself.
        seed: of its draws.
    """
    match settings:
        case DeMoSettings():
            return DeMo(settings, parameters, workers, base)
        case DionSettings():
            return Dion(settings, parameters, workers, base, dense_rate, seed)
        case GreedyLoreReferenceSettings():
            return GreedyLoreReference(settings, parameters, workers, base, seed)
        case OneBitAdamSettings():
            return OneBitAdam(settings, parameters, workers, base)
        case SparseSettings():
            return Sparse(settings, parameters, workers, base)
