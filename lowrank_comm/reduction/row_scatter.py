"""Converts between the whole gradients that a rank holds and what its reducer averages.

Where every rank is a worker, both are the same, and nothing is copied or sent. With two
levels the ranks of a node share the work by blocks of rows:

    scatter   the mean over the node, of which each rank receives a block of rows;
              one reduce-scatter a portion
    ...       the reducer averages the blocks between the nodes, compressed
    gather    every rank of the node receives all blocks of the result;
              one all-gather a portion

This serves engines whose ranks all hold whole gradients: a plain model, DDP, and
DeepSpeed. Each rank then has the error memory and the compressor's work of its rows
only. FSDP does the first part by itself. The mean is formed in the wider of float32 and
the gradient's dtype. A gradient that is missing on some ranks of the node counts as
zero there; how many ranks have one is summed before the first portion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

import torch
from torch import Tensor

from lowrank_comm.communication import IntraNodeGroup
from lowrank_comm.numerics.device import numbers_on
from lowrank_comm.reduction.gradients import unusable, writable
from lowrank_comm.reduction.params import ParamInfo

# bytes of gradients in one collective: a buffer is needed for one portion at a time
PORTION = 1 << 26


class RowScatter:
    """Turns whole gradients into this rank's blocks of rows, and results back.

    A pass is `scatter`, and `gather` unless it was vetoed.

    Args:
        whole: the parameters as every rank of the node holds them; with two levels
            their blocks are on the device of the first.
        intra_node: the ranks of the node.

    Attributes:
        whole: as given.
        slots: what the reducer averages: this rank's blocks, or the parameters
            themselves where every rank is a worker.
        refused: of the last pass, place of a slot -> why its gradient cannot be
            averaged, as given and, with two levels, as found; "" where that is another
            rank's of the node. The blocks of these are None, and the reducer tells the
            other nodes.
    """

    def __init__(self, whole: Sequence[ParamInfo], intra_node: IntraNodeGroup) -> None:
        self.slots, self.whole, self._intra_node = list(whole), list(whole), intra_node
        self._device = whole[0].device if whole else torch.device("cpu")
        if intra_node.size > 1:
            self.slots = [self._block(info) for info in whole]
        self._portions = self._cut()
        self.refused: dict[int, str] = {}

    def _block(self, info: ParamInfo) -> ParamInfo:
        whole = replace(
            info, dtype=info.compute_dtype, device=self._device, whole=info.shape or (1,)
        )
        return replace(whole, shape=whole.block(self._intra_node, self._intra_node.rank))

    def _cut(self) -> list[list[int]]:
        """Return the parameters that share a collective, of one dtype each."""
        portions: list[list[int]] = []
        # of each dtype: the bytes that are left, and the portion
        room: dict[torch.dtype, tuple[int, list[int]]] = {}
        for k, info in enumerate(self.whole):
            size = self._padded(k) * self.slots[k].dtype.itemsize * self._intra_node.size
            left, portion = room.get(info.dtype, (0, []))
            if not portion or size > left:
                left, portion = PORTION, []
                portions.append(portion)
            portion.append(k)
            room[info.dtype] = (left - size, portion)
        return portions

    def _padded(self, k: int) -> int:
        """Return the elements of the largest block of a parameter, to which all are
        padded.
        """
        return math.prod(self.slots[k].block(self._intra_node, 0))

    @torch.no_grad()
    def scatter(
        self, gradients: Sequence[Tensor | None], refused: Mapping[int, str] = MappingProxyType({})
    ) -> list[Tensor | None]:
        """Return this rank's blocks of the node's mean gradients; a collective inside
        the node.

        Args:
            gradients: whole ones, None where this rank has none. `gather` overwrites
                them.
            refused: place of a slot -> what this rank has that cannot be averaged,
                beside gradients that are unusable by themselves.

        Returns:
            In slot order, new tensors, or None where no rank of the node has a
            gradient. The gradients themselves where every rank is a worker.
        """
        self.refused = dict(refused)
        if self._intra_node.size == 1:
            return list(gradients)
        self.refused |= unusable(self.whole, gradients, range(len(gradients)))
        if self.refused:
            gradients = [None if k in self.refused else g for k, g in enumerate(gradients)]
        numbers = [
            math.nan if k in self.refused else g is not None for k, g in enumerate(gradients)
        ]
        present = numbers_on(self._device, list(map(float, numbers)), torch.float32)
        self._intra_node.sum_(present, "control")
        blocks: list[Tensor | None] = [None] * len(gradients)
        for portion in self._portions:
            lengths = [self._padded(k) for k in portion]
            dtype = self.slots[portion[0]].dtype
            buffer = torch.zeros(
                self._intra_node.size, sum(lengths), dtype=dtype, device=self._device
            )
            copies: list[tuple[Tensor, Tensor]] = []
            for k, room in zip(portion, buffer.split(lengths, dim=1), strict=True):
                gradient = gradients[k]
                if gradient is not None:
                    copies += _blocks(room, gradient.reshape(-1))
            _copy(copies)
            mine = self._intra_node.scatter_mean(buffer, "gradients")
            for k, piece in zip(portion, mine.split(lengths), strict=True):
                blocks[k] = piece[: self.slots[k].numel].view(self.slots[k].shape)
        counts = self._intra_node.read(present, [float(self._intra_node.size)] * len(present))
        for k, count in enumerate(counts):
            if math.isnan(count):
                self.refused.setdefault(k, "")
        return [block if count > 0 else None for block, count in zip(blocks, counts, strict=True)]

    @torch.no_grad()
    def gather(
        self, blocks: Sequence[Tensor | None], gradients: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Return the whole results; a collective inside the node.

        Args:
            blocks: in slot order, None for the same parameters on all ranks of the
                node.
            gradients: as given to `scatter`; overwritten.

        Returns:
            In slot order: these tensors, or new ones where this rank had none that can
            be written to.
        """
        if self._intra_node.size == 1:
            return list(blocks)
        results = writable(self.whole, gradients)
        for portion in self._portions:
            members = [k for k in portion if blocks[k] is not None]
            if not members:
                continue
            lengths = [self._padded(k) for k in members]
            # rounded as p.grad will be
            dtype = self.whole[members[0]].dtype
            buffer = torch.zeros(sum(lengths), dtype=dtype, device=self._device)
            copies = []
            for k, room in zip(members, buffer.split(lengths), strict=True):
                block = blocks[k]
                assert block is not None
                copies.append((room[: block.numel()], block.reshape(-1)))
            _copy(copies)
            everything = self._intra_node.gather(buffer, "results")
            copies = []
            for k, parts in zip(members, everything.split(lengths, dim=1), strict=True):
                info, target = self.whole[k], results[k]
                if target is None:
                    target = results[k] = torch.empty(info.shape, dtype=dtype, device=info.device)
                if target.is_contiguous():
                    copies += [(to, of) for of, to in _blocks(parts, target.view(-1))]
                else:
                    target.copy_(parts.reshape(-1)[: info.numel].view(info.shape))
            _copy(copies)
        return results


def _blocks(rows: Tensor, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return the pairs (a part of row f of (F, padded), block f of a vector); rows
    behind the vector's end have none.
    """
    width = rows.shape[1]
    parts = flat.split(width) if width else ()
    return [(row[: part.numel()], part) for row, part in zip(rows.unbind(0), parts, strict=False)]


def _copy(pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Copy the second of each pair to the first, all at once."""
    if pairs:
        targets, sources = zip(*pairs, strict=True)
        torch._foreach_copy_(targets, sources)
