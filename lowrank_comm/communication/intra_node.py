"""The ranks of one node that together are one worker: they hold its matrices in blocks
of rows.

Between nodes, each rank talks to the ranks that hold the same block (`group.Group`);
inside a node the ranks of an `IntraNodeGroup` talk to one another, exactly and in full
width. Blocks are as `torch.chunk` makes them along the rows, as FSDP shards a
parameter: ceil(m / F) rows each, the last ones fewer or none.

With `scope="shard"` each block is a matrix of its own, and the ranks of a node only
agree on whether a step counts. With `scope="matrix"` the algorithm is that of the whole
matrix: each product that contracts over rows (the Gram matrix of P, Delta^T P) is
summed over the node.

Sums that decide how a basis looks are formed in rank order on every rank
(`sum_in_order`), so that all nodes get the same bits from the same numbers; an
all-reduce promises that only within one group.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_comm.communication.failures import collective_failed
from lowrank_comm.options import check

Scope = Literal["shard", "matrix"]

# Renamed in torch 2.13; the older names warn there.
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def block_of(m: int, size: int, rank: int) -> slice:
    """Return the rows of an m-row matrix that rank `rank` of `size` holds, as
    torch.chunk cuts it.
    """
    length = -(-m // size)
    start = min(rank * length, m)
    return slice(start, min(start + length, m))


def joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors of one dtype as one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def split_like(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Cut a vector into tensors of the shapes of those given."""
    pieces = flat.split([tensor.numel() for tensor in tensors])
    return [piece.view(tensor.shape) for piece, tensor in zip(pieces, tensors, strict=True)]


class IntraNodeGroup:
    """The ranks inside a node; without arguments, this rank alone, for which everything
    is a no-op.

    Args:
        process_group: of the ranks inside the node, or None for this rank alone.
        scope: "shard" (each block of rows is a matrix of its own) or "matrix" (the
            whole-matrix algorithm).

    Attributes:
        bytes: kind -> bytes that this rank has handed to collectives inside the node.

    Raises:
        ConfigError: an unknown scope.
    """

    def __init__(self, process_group: Any = None, scope: str = "shard") -> None:
        check("shard_scope", scope, Scope)
        self.process_group, self.scope = process_group, scope
        self.size = 1 if process_group is None else dist.get_world_size(process_group)
        self.rank = 0 if process_group is None else dist.get_rank(process_group)
        self.bytes: Counter[str] = Counter()

    @property
    def whole_matrices(self) -> bool:
        """Whether the ranks of the node carry out the algorithm of the whole matrix
        together.
        """
        return self.size > 1 and self.scope == "matrix"

    def alone(self) -> IntraNodeGroup:
        """Return this rank as a group of its own."""
        return IntraNodeGroup()

    def block(self, m: int, rank: int | None = None) -> slice:
        """Return the rows of an m-row matrix that this rank holds, or another one of
        the node.
        """
        return block_of(m, self.size, self.rank if rank is None else rank)

    def sum_(self, tensor: Tensor, kind: str) -> None:
        """Sum a tensor over the node, in place."""
        if self.size > 1:
            self.bytes[kind] += tensor.nbytes
            self.run(dist.all_reduce, tensor)

    def run(self, collective: Callable[..., Any], *tensors: Tensor) -> None:
        """Carry out a collective of the node."""
        try:
            collective(*tensors, group=self.process_group)
        except RuntimeError as error:
            raise collective_failed(error) from error

    def read(self, numbers: Tensor, hoped: Sequence[float]) -> list[float]:
        """Return numbers that were summed over the node; the host waits for them.

        Args:
            numbers: 1-D.
            hoped: what they are where all goes well, for a rehearsal of it.
        """
        found: list[float] = numbers.tolist()
        return found

    def gather(self, flat: Tensor, kind: str) -> Tensor:
        """Gather a 1-D tensor of every rank of the node, of one length on all: (F,
        numel).
        """
        self.bytes[kind] += flat.nbytes
        everything = flat.new_empty(self.size * flat.numel())
        self.run(_all_gather, everything, flat.contiguous())
        return everything.view(self.size, -1)

    def sum_in_order(self, tensors: Sequence[Tensor], kind: str) -> list[Tensor]:
        """Return the sum of each tensor over the node, added up in rank order: the same
        bits on every node.
        """
        if self.size == 1:
            return list(tensors)
        return split_like(self.gather(joined(tensors), kind).sum(dim=0), tensors)

    def whole_rows(self, block: Tensor, m: int, kind: str) -> Tensor:
        """Return (B, m, k), the matrices whose rows `block` (B, own rows, k) this rank
        holds.
        """
        if self.size == 1:
            return block
        longest = self.block(m, 0).stop
        padded = block.new_zeros(block.shape[0], longest, block.shape[2])
        padded[:, : block.shape[1]] = block
        parts = self.gather(padded.reshape(-1), kind).view(self.size, *padded.shape)
        return parts.transpose(0, 1).flatten(1, 2)[:, :m]

    def whole(self, block: Tensor, shape: Sequence[int], dim: int, kind: str) -> Tensor:
        """Return the whole tensor of `shape`, cut along `dim`, of which this rank holds
        `block`.
        """
        moved = [shape[dim], *shape[:dim], *shape[dim + 1 :]]
        rows = block.movedim(dim, 0).reshape(1, block.shape[dim], math.prod(moved[1:]))
        return self.whole_rows(rows, shape[dim], kind).reshape(moved).movedim(0, dim)

    def own(self, whole: Tensor, dim: int) -> Tensor:
        """Return this rank's block of a whole tensor that is cut along `dim`."""
        held = self.block(whole.shape[dim])
        return whole.narrow(dim, held.start, held.stop - held.start)

    def scatter_mean(self, rows_by_rank: Tensor, kind: str) -> Tensor:
        """Return (numel,), the mean over the node of row `rank` of (F, numel)."""
        self.bytes[kind] += rows_by_rank.nbytes
        mine = rows_by_rank.new_empty(rows_by_rank.shape[1])
        self.run(_reduce_scatter, mine, rows_by_rank.reshape(-1))
        return mine.div_(self.size)
