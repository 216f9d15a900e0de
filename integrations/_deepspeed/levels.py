"""The averaging of whole gradients of a DeepSpeed engine, on one level or on two.

At the accumulation boundary every rank holds whole gradients, at any ZeRO stage. With
two levels

    scatter    gives each rank of a node a block of rows of the node's exact mean;
    reduce     averages the blocks between the nodes, low-rank;
    gather     gives every rank of a node the whole result,

and DeepSpeed then cuts its partitions out of whole gradients as it does with one level.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lowrank_comm.communication import Group, IntraNodeGroup
from lowrank_comm.integrations._deepspeed.topology import groups
from lowrank_comm.reduction.gradients import writable
from lowrank_comm.reduction.params import ParamInfo
from lowrank_comm.reduction.plan import human_bytes
from lowrank_comm.reduction.reducer import Outcome, Reducer
from lowrank_comm.reduction.row_scatter import RowScatter


class Levels:
    """Averages the whole gradients of an engine, on one level or on two.

    Args:
        everyone: all ranks that share the engine.
        size: F, from `node_size`.
        scope: "shard" or "matrix".
        whole: the trained parameters, in the same order on all ranks, with the dtypes
            of their gradients.
        device: of the computation.

    Attributes:
        group: the workers: everyone, or the ranks of this rank's place in the other
            nodes.
        intra_node: the ranks of this node.
        slots: what this rank's reducer averages.
        rows: what cuts whole gradients into these.
    """

    def __init__(
        self,
        everyone: Group,
        size: int,
        scope: str,
        whole: Sequence[ParamInfo],
        device: torch.device,
    ) -> None:
        self.group, self.intra_node = everyone, IntraNodeGroup(scope=scope)
        if size > 1:
            between, inside = groups(everyone, size, device)
            self.group, self.intra_node = Group(between), IntraNodeGroup(inside, scope)
        self._whole, self.rows = whole, RowScatter(whole, self.intra_node)
        self.slots = self.rows.slots

    def reduce(
        self,
        reducer: Reducer,
        gradients: Sequence[Tensor | None],
        scale: float,
        refused: Mapping[int, str],
    ) -> Outcome:
        """Average the gradients of one step; a collective of everyone.

        Args:
            reducer: of `slots`, over `group` and `intra_node`.
            gradients: whole local ones, None where there is none; overwritten.
            scale: the loss scale that they carry.
            refused: place of a parameter -> what this rank has that cannot be averaged.

        Returns:
            The outcome with whole gradients. After a veto NaN everywhere: DeepSpeed
            looks only at what a rank owns or has a gradient for, so every rank gets all
            of it.
        """
        # ranks of a node with different models would wait for each other in the scatter
        reducer.ensure_agreed()
        blocks = self.rows.scatter(gradients, refused)
        outcome = reducer.reduce(blocks, scale=scale, refused=self.rows.refused)
        if outcome.applied:
            return replace(outcome, grads=self.rows.gather(outcome.grads, gradients))
        return replace(outcome, grads=self._nan(gradients))

    def _nan(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [
            g.fill_(torch.nan)
            if g is not None
            else torch.full(info.shape, torch.nan, dtype=info.dtype, device=info.device)
            for g, info in zip(writable(self._whole, gradients), self._whole, strict=True)
        ]

    def notes(self) -> list[str]:
        """Return lines of the plan: what every rank holds until the boundary, and what
        is sent inside a node.
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
