"""Who is a worker: every rank, or the node, whose ranks share its work.

With two levels the ranks form a grid (nodes, ranks in a node). Between nodes, each rank
talks to those of the same place in the other nodes (`Group`); inside a node to its
neighbours (`IntraNodeGroup`). A 2-D device mesh is read by position: its first
dimension goes between the nodes, its second inside.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lowrank_comm.communication.group import Group
from lowrank_comm.communication.intra_node import IntraNodeGroup, Scope
from lowrank_comm.errors import ConfigError
from lowrank_comm.options import PositiveInt, check, check_options

ShardSize = PositiveInt | Literal["node"]


@dataclass(frozen=True)
class Topology:
    """Who is a worker.

    Args:
        shard_size: 1: every rank is a worker; F or "node": F ranks (those that the
            launcher started on a node) are one worker, averaged exactly inside.
        shard_scope: "shard" compresses each rank's block of rows alone, "matrix"
            computes whole matrices together.

    Raises:
        ConfigError: a value is unknown.
    """

    shard_size: ShardSize = 1
    shard_scope: Scope = "shard"

    def __post_init__(self) -> None:
        check_options(self, "topology.")


def levels(process_group: Any, shard_scope: str = "shard") -> tuple[Group, IntraNodeGroup]:
    """Return the workers, and the ranks of this node.

    Args:
        process_group: None, a `ProcessGroup`, a 1-D mesh, or a 2-D mesh (between nodes,
            inside a node).
        shard_scope: see `IntraNodeGroup`.

    Raises:
        ConfigError: a mesh of more dimensions, an unknown scope, or what `Group`
            refuses.
    """
    if isinstance(process_group, DeviceMesh) and process_group.ndim != 1:
        if process_group.ndim != 2:
            raise ConfigError(
                f"process_group: a {process_group.ndim}-D mesh {process_group.mesh_dim_names}; give"
                " the two dimensions over which data differ (between nodes, inside a node), for"
                " example mesh['replicate', 'shard'], or one of them."
            )
        inside = process_group.get_group(1) if process_group.size(1) > 1 else None
        return Group(process_group.get_group(0)), IntraNodeGroup(inside, shard_scope)
    return Group(process_group), IntraNodeGroup(scope=shard_scope)


def grid(shard_size: int | str) -> DeviceMesh | None:
    """Make a 2-D mesh of all ranks with `shard_size` ranks in a node; None where every
    rank is a worker. A collective.

    Args:
        shard_size: F, or "node" for the number of ranks that the launcher started on
            each node.

    Raises:
        ConfigError: torch.distributed is not initialised, F does not divide the number
            of ranks, or "node" without LOCAL_WORLD_SIZE.
    """
    check("topology.shard_size", shard_size, ShardSize)
    size = ranks_in_a_node() if shard_size == "node" else int(shard_size)
    if not size:
        raise ConfigError(
            'topology.shard_size="node" needs LOCAL_WORLD_SIZE (torchrun sets it) or LOCAL_SIZE'
            " (deepspeed does); give the number of ranks in a node instead."
        )
    if size == 1:
        return None
    if not (dist.is_available() and dist.is_initialized()):
        raise ConfigError(
            f"topology.shard_size={shard_size!r} needs torch.distributed; call init_process_group"
            " first."
        )
    world = dist.get_world_size()
    if world % size:
        raise ConfigError(
            f"topology.shard_size={shard_size!r}: {world} ranks cannot be cut into nodes of {size};"
            f" choose a divisor of {world}."
        )
    kind = "cuda" if torch.cuda.is_available() and dist.get_backend() != "gloo" else "cpu"
    return init_device_mesh(kind, (world // size, size), mesh_dim_names=("replicate", "shard"))


def timeout_of(group: Any) -> timedelta | None:
    """Return how long a collective of a process group may wait, for groups that are
    made beside it: torch gives those its own default, of half an hour. None where torch
    does not tell.
    """
    group = group or dist.group.WORLD
    backend = group._get_backend(group._device_types[0])
    timeout: timedelta | None = getattr(getattr(backend, "options", None), "_timeout", None)
    return timeout


def covered_ranks(process_group: Any) -> list[int]:
    """Return the global ranks of a process group or mesh, both of its dimensions
    included; those of the default group for None.
    """
    if isinstance(process_group, DeviceMesh):
        return [int(rank) for rank in process_group.mesh.flatten().tolist()]
    return dist.get_process_group_ranks(process_group or dist.group.WORLD)


def launched_ranks() -> int:
    """Return how many ranks the launcher says that it has started; 1 if it says
    nothing.
    """
    value = os.environ.get("WORLD_SIZE", "")
    return int(value) if value.isdecimal() else 1


def ranks_in_a_node() -> int | None:
    """Return how many ranks the launcher started on this node, if it tells."""
    # of torchrun, or of deepspeed
    value = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE")
    return int(value) if value else None
