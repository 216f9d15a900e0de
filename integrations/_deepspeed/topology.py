"""Who is a worker of a DeepSpeed engine: every rank, or the node, whose ranks share its
gradients and error memory.

With two levels a pass over the whole gradients, which every rank holds at the
accumulation boundary at any ZeRO stage, is

    scatter    the exact mean inside the node, of which each rank gets a block of rows
    reduce     low-rank factors of the blocks, between the nodes
    gather     the whole result, inside the node

and DeepSpeed then cuts its partitions out of whole gradients as it does with one level.
Nodes are runs of consecutive ranks of the engine's data-parallel group, as for
`zero_hpz_partition_size`.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_comm.communication import Group, IntraNodeGroup
from lowrank_comm.communication.topology import Topology, ranks_in_a_node
from lowrank_comm.config import SECTION
from lowrank_comm.errors import ConfigError
from lowrank_comm.reduction.plan import human_bytes
from lowrank_comm.reduction.reducer import Outcome, ParamInfo, Reducer
from lowrank_comm.reduction.row_scatter import RowScatter

__all__ = ["Levels", "node_size"]

_KEY = f"{SECTION}.topology.shard_size"
Shape = tuple[str, tuple[int, ...], torch.dtype]
"""Name, shape of the whole parameter, dtype of its gradient."""


def node_size(topology: Topology, group: Group, device: torch.device) -> int:
    """F, the ranks of a node, checked before an engine is built; a collective of the
    group if it is "node".

    Args:
        topology: of the section, the same on all ranks.
        group: all ranks that are going to share the engine.
        device: of the words that are compared.

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
    """The ranks that the launcher started on each node, if the group consists of whole
    nodes.
    """
    try:
        mine = f"{ranks_in_a_node() or ''}"
    except ValueError:
        mine = ""
    # The variable may be there on some ranks only, or differ between nodes: all must
    # hear of it, or some would wait.
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
    """Ranks in the world, in the order of the group."""
    return dist.get_process_group_ranks(group.process_group) if group.initialised else [0]


def _runs(members: Sequence[int], size: int) -> list[Sequence[int]]:
    return [members[start : start + size] for start in range(0, len(members), size)]


# A process group costs connections, and nobody tells when an engine is gone for good:
# engines of the same ranks share them.
_made: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], tuple[Any, Any]]] = (
    weakref.WeakKeyDictionary()
)


def _groups(everyone: Group, size: int, device: torch.device) -> tuple[Any, Any]:
    """The process groups of this rank, (between nodes, inside its node); a collective
    where they are not there yet.

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
        mine: list[Any] = []
        for kind in (between, _runs(members, size)):
            for ranks in kind:
                # All ranks of the world make all groups in one order: what NCCL needs
                # to split a communicator.
                if of_the_world:
                    made = dist.new_group(list(ranks))
                elif dist.get_rank() in ranks:
                    made = dist.new_group(list(ranks), use_local_synchronization=True)
                if dist.get_rank() in ranks:
                    mine.append(made)
        known[key] = (mine[0], mine[1])
    return known[key]


def _check_alone(everyone: Group, device: torch.device) -> None:
    """Whether a part of the world can make groups without the rest. torch would wait
    for ever where it cannot.
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


class Levels:
    """Between the whole gradients of an engine and its reducer.

    Args:
        process_group: all ranks that share the engine.
        size: F, from `node_size`.
        scope: "shard" or "matrix".
        shapes: the trained parameters, in the same order on all ranks.
        device: of the computation.

    Attributes:
        everyone: all ranks of the engine.
        group: the workers: everyone, or the ranks of this rank's place in the other
            nodes.
        intra_node: the ranks of this node.
        slots: what this rank's reducer averages.
    """

    def __init__(
        self,
        process_group: Any,
        size: int,
        scope: str,
        shapes: Sequence[Shape],
        device: torch.device,
    ) -> None:
        self.everyone = self.group = Group(process_group)
        self.intra_node = IntraNodeGroup(scope=scope)
        if size > 1:
            between, inside = _groups(self.everyone, size, device)
            self.group, self.intra_node = Group(between), IntraNodeGroup(inside, scope)
        self._whole = [ParamInfo(name, shape, dtype, device) for name, shape, dtype in shapes]
        self._rows = RowScatter(self._whole, self.intra_node)
        self.slots = self._rows.slots

    def reduce(self, reducer: Reducer, gradients: Sequence[Tensor | None], scale: float) -> Outcome:
        """Average the gradients of one step; a collective of everyone.

        Args:
            reducer: of `slots`, over `group` and `intra_node`.
            gradients: whole local ones, None where there is none; overwritten.
            scale: the loss scale that they carry.

        Returns:
            The outcome with whole gradients. After a veto NaN everywhere: DeepSpeed
            looks only at what a rank owns or has a gradient for, so every rank gets all
            of it.
        """
        # ranks of a node with different models would wait for each other in the scatter
        reducer.ensure_agreed()
        outcome = reducer.reduce(self._rows.scatter(gradients), scale=scale)
        if outcome.applied:
            return replace(outcome, grads=self._rows.gather(outcome.grads))
        self._rows.forget()
        return replace(outcome, grads=self._nan(gradients))

    def _nan(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [
            g.fill_(torch.nan)
            if g is not None
            else torch.full(info.shape, torch.nan, dtype=info.dtype, device=info.device)
            for g, info in zip(gradients, self._whole, strict=True)
        ]

    def error_memory(self, reducer: Reducer) -> dict[str, Tensor]:
        """Parameter name -> this rank's block of its error, a live view; empty where it
        holds no row, dense ones absent.
        """
        return {
            slot.name: shaped["error"]
            for slot, _, shaped in reducer.state.blocks()
            if "error" in shaped
        }

    def notes(self) -> list[str]:
        """Lines of the plan: what every rank holds until the boundary, and what goes
        inside a node.
        """
        local = sum(info.numel * info.dtype.itemsize for info in self._whole)
        held = f"until then every rank holds all of its local gradients ({human_bytes(local)})"
        if self.intra_node.size == 1:
            return [
                f"{held}, and the whole error memory where one is kept",
                (
                    '("error_feedback": {"offload": true} moves that to the CPU); a checkpoint'
                    " sends the error memory once"
                ),
            ]
        size, gradients, results = self.intra_node.size, 0, 0
        for slot, info in zip(self.slots, self._whole, strict=True):
            largest = math.prod(slot.block(self.intra_node, 0))
            gradients += size * largest * slot.dtype.itemsize
            results += largest * info.dtype.itemsize
        return [
            f"{held}, and 1/{size} of the error memory",
            (
                f"inside a node, a rank and a step: {human_bytes(gradients)} into a reduce-scatter"
                f" of the gradients (an exact mean), {human_bytes(results)} into an all-gather of"
                " the result"
            ),
            "a checkpoint sends the error memory once between nodes and once inside them",
        ]
