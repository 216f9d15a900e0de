"""Whole gradients on every rank, two levels: each rank of a node gets the node's mean
of its rows, and the way back.

    scatter   the mean over the node, of which each rank receives a block of rows   one reduce-scatter a portion
    ...       the reducer averages the blocks between the nodes, compressed
    gather    every rank of the node receives all blocks of the result              one all-gather a portion

This is for engines whose ranks all hold whole gradients: a plain model, DDP, and
DeepSpeed. Error memory and the compressor's work are then shared by the ranks of a
node. FSDP does the first part by itself. The mean is formed in the wider of float32 and
the gradient's dtype. A gradient that is missing on some ranks of the node counts as
zero there; how many have one travels with the first portion.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_comm.communication import IntraNodeGroup
from lowrank_comm.numerics.device import numbers_on
from lowrank_comm.reduction.params import ParamInfo

# bytes of gradients that travel together: room is needed for one portion at a time
PORTION = 1 << 26


@dataclass(frozen=True)
class _Portion:
    """Parameters of one dtype that travel together."""

    members: list[int]
    dtype: torch.dtype


class RowScatter:
    """Between whole gradients and this rank's blocks of their rows.

    Args:
        shapes: of the whole parameters, by name, with the dtype of their gradients.
        device: of the computation.
        intra_node: the ranks of the node.

    Attributes:
        slots: the blocks of this rank, for the reducer.
    """

    def __init__(
        self,
        shapes: Sequence[tuple[str, tuple[int, ...], torch.dtype]],
        device: torch.device,
        intra_node: IntraNodeGroup,
    ) -> None:
        self._intra_node, self._device = intra_node, device
        self._shapes = [shape for _, shape, _ in shapes]
        self._dtypes = [dtype for _, _, dtype in shapes]
        self.slots = [self._slot(name, shape, dtype) for name, shape, dtype in shapes]
        self._portions = self._cut()

    def _slot(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> ParamInfo:
        whole = shape or (1,)
        rows = self._intra_node.block(whole[0])
        block = (rows.stop - rows.start, *whole[1:])
        return ParamInfo(
            name, block, torch.promote_types(dtype, torch.float32), self._device, whole
        )

    def _cut(self) -> list[_Portion]:
        portions: list[_Portion] = []
        room: dict[torch.dtype, tuple[int, _Portion]] = {}
        for k, dtype in enumerate(self._dtypes):
            size = self._padded(k) * self.slots[k].dtype.itemsize * self._intra_node.size
            left, portion = room.get(dtype, (0, None))
            if portion is None or size > left:
                left, portion = PORTION, _Portion([], dtype)
                portions.append(portion)
            portion.members.append(k)
            room[dtype] = (left - size, portion)
        return portions

    def _padded(self, k: int) -> int:
        """Elements of the largest block of a parameter, as which all its blocks travel."""
        whole = self.slots[k].whole
        assert whole is not None
        return self._intra_node.longest(whole[0]) * math.prod(whole[1:])

    @torch.no_grad()
    def scatter(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """This rank's blocks of the node's mean gradients; a collective inside the
        node.

        Args:
            gradients: whole ones, None where this rank has none; read only.

        Returns:
            Blocks in slot order, new tensors; None where no rank of the node has a
            gradient.
        """
        present = numbers_on(self._device, [float(g is not None) for g in gradients], torch.float32)
        self._intra_node.sum_([present], "control")
        blocks: list[Tensor | None] = [None] * len(gradients)
        for portion in self._portions:
            lengths = [self._padded(k) for k in portion.members]
            dtype = torch.promote_types(portion.dtype, torch.float32)
            buffer = torch.zeros(
                self._intra_node.size, sum(lengths), dtype=dtype, device=self._device
            )
            for k, room in zip(portion.members, buffer.split(lengths, dim=1), strict=True):
                gradient = gradients[k]
                if gradient is not None:
                    self._spread(gradient, room)
            mine = self._intra_node.scatter_mean(buffer, "gradients")
            for k, piece in zip(portion.members, mine.split(lengths), strict=True):
                blocks[k] = piece[: self.slots[k].numel].view(self.slots[k].shape)
        return [
            block if there else None
            for block, there in zip(blocks, (present > 0).tolist(), strict=True)
        ]

    def _spread(self, gradient: Tensor, room: Tensor) -> None:
        """Row f of room (F, padded) becomes block f of the gradient."""
        flat, width = gradient.reshape(-1), room.shape[1]
        for f in range(self._intra_node.size):
            part = flat[f * width : (f + 1) * width]
            room[f, : part.numel()] = part

    @torch.no_grad()
    def gather(
        self, blocks: Sequence[Tensor | None], gradients: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The whole results; a collective inside the node.

        Args:
            blocks: in slot order, None for the same parameters on all ranks of the
                node.
            gradients: the whole gradients given to `scatter`, overwritten.

        Returns:
            In slot order; the gradients given, or new tensors where this rank had none.
        """
        results = list(gradients)
        for portion in self._portions:
            members = [k for k in portion.members if blocks[k] is not None]
            if not members:
                continue
            lengths = [self._padded(k) for k in members]
            # rounded as p.grad will be
            buffer = torch.zeros(sum(lengths), dtype=portion.dtype, device=self._device)
            for k, room in zip(members, buffer.split(lengths), strict=True):
                block = blocks[k]
                assert block is not None
                room[: block.numel()] = block.reshape(-1)
            everything = self._intra_node.gather(buffer, "results")
            for k, parts in zip(members, everything.split(lengths, dim=1), strict=True):
                whole = parts.reshape(-1)[: math.prod(self._shapes[k])].view(self._shapes[k])
                target = results[k]
                if target is None:
                    results[k] = whole.clone()
                else:
                    target.copy_(whole)
        return results
