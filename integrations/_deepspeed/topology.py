"""What a worker of a DeepSpeed engine is: every rank, or a node, whose ranks share its
gradients and error memory.

Nodes are runs of consecutive ranks of the engine's data-parallel group, as for
`zero_hpz_partition_size`. `node_size` finds how many ranks a node has, before an engine
is built; `groups` makes the process groups between and inside nodes.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from lowrank_comm.communication import Group
from lowrank_comm.communication.topology import Topology, ranks_in_a_node, timeout_of
from lowrank_comm.config import SECTION
from lowrank_comm.errors import ConfigError

_KEY = f"{SECTION}.topology.shard_size"


def node_size(topology: Topology, group: Group, device: torch.device) -> int:
    """Return F, the number of ranks in a node; a collective of the group if the setting
    is "node".

    Args:
        topology: of the section, the same on all ranks.
        group: all ranks that are going to share the engine.
        device: of the tensors that are compared.

    Returns:
        F, the same on all ranks; 1 where every rank is a worker.

    Raises:
        ConfigError: on all ranks, if the group cannot be cut into nodes of F
            consecutive ranks.
    """
    size = topology.shard_size
    if size == "node":
        return _launched(group, device)
    assert isinstance(size, int)
    if group.size % size:
        raise ConfigError(
            f"{_KEY}={size}: {group.size} data-parallel ranks cannot be cut into nodes of {size};"
            f" choose a divisor of {group.size}, or 1 to make every rank a worker."
        )
    return size


def _launched(group: Group, device: torch.device) -> int:
    """Return how many ranks the launcher started on each node, if the group consists of
    whole nodes.
    """
    try:
        mine = f"{ranks_in_a_node() or ''}"
    except ValueError:
        mine = ""
    # The variable may be set on some ranks only, or differ between nodes: all ranks
    # must know, or some would wait.
    told = [words.decode() for words in group.gather_bytes(mine.encode(), device)]
    fix = (
        "give the number of ranks in a node instead, for example 8, or 1 to make every rank a"
        " worker."
    )
    for rank, words in enumerate(told):
        if not words or int(words) < 1:
            raise ConfigError(
                f'{_KEY}="node" needs LOCAL_WORLD_SIZE (torchrun sets it) or LOCAL_SIZE (deepspeed'
                f" does), and rank {rank} has no number there; {fix}"
            )
    for rank, words in enumerate(told):
        if words != told[0]:
            raise ConfigError(
                f'{_KEY}="node": the launcher started {told[0]} ranks on the node of rank 0 and'
                f" {words} on that of rank {rank}; {fix}"
            )
    size = int(told[0])
    members = _members(group)
    if len(members) % size or any(
        len({one // size for one in node}) > 1 for node in _runs(members, size)
    ):
        ranks = (
            f"{members[0]} to {members[-1]}" if len(members) > 4 else ", ".join(map(str, members))
        )
        raise ConfigError(
            f'{_KEY}="node": {size} ranks were started on each node, and the {len(members)}'
            f" data-parallel ranks ({ranks}) are not all ranks of some nodes; {fix}"
        )
    return size


def _members(group: Group) -> list[int]:
    """Return the ranks in the world, in the order of the group."""
    return dist.get_process_group_ranks(group.process_group) if group.initialised else [0]


def _runs(members: Sequence[int], size: int) -> list[Sequence[int]]:
    return [members[start : start + size] for start in range(0, len(members), size)]


Pair = tuple[dist.ProcessGroup, dist.ProcessGroup]
"""The process groups of a rank, between nodes and inside its node."""

# A process group costs connections, and there is no sign that an engine is gone for
# good: engines of the same ranks share them.
_made: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], Pair]] = weakref.WeakKeyDictionary()


def groups(everyone: Group, size: int, device: torch.device) -> Pair:
    """Return the process groups of this rank, between nodes and inside its node; a
    collective where they are not there yet.

    Args:
        everyone: all ranks of an engine.
        size: F, from `node_size`.
        device: of the tensors that are compared.

    Raises:
        ConfigError: they cannot be made without the ranks that are no part of the
            engine.
    """
    members = _members(everyone)
    known = _made.setdefault(dist.group.WORLD, {})
    key = (size, *members)
    if key not in known:
        between = [members[place::size] for place in range(size)]
        of_the_world = len(members) == dist.get_world_size()
        if not of_the_world:
            _check_alone(everyone, device)
        mine, timeout = [], timeout_of(everyone.process_group)
        for kind in (between, _runs(members, size)):
            for ranks in kind:
                # All ranks of the world make all groups in one order: what NCCL needs
                # to split a communicator.
                if of_the_world or dist.get_rank() in ranks:
                    made = dist.new_group(
                        list(ranks), timeout, use_local_synchronization=not of_the_world
                    )
                if dist.get_rank() in ranks:
                    mine.append(made)
        known[key] = (mine[0], mine[1])
    return known[key]


def _check_alone(everyone: Group, device: torch.device) -> None:
    """Raise ConfigError if a part of the world cannot make groups without the rest;
    torch would wait for ever.
    """
    fix = f"Set {_KEY} to 1, or let the engine have all ranks."
    world = dist.group.WORLD
    if getattr(world, "bound_device_id", None) is not None:
        raise ConfigError(
            f"{_KEY}: the engine has {everyone.size} of {dist.get_world_size()} ranks, and"
            " init_process_group was given a device_id (deepspeed does that on CUDA): NCCL then"
            f" makes groups with all ranks of the world only. {fix}"
        )
    # torch names a group that only its members make by how many they have already.
    count = str(len(getattr(getattr(dist.distributed_c10d, "_world", None), "pg_names", ())))
    counts = [words.decode() for words in everyone.gather_bytes(count.encode(), device)]
    if len(set(counts)) > 1:
        raise ConfigError(
            f"{_KEY}: the ranks of the engine are in {' or '.join(sorted(set(counts)))} process"
            " groups each, and torch makes groups of these ranks alone only where all are in"
            f" equally many. {fix}"
        )
