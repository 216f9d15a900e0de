"""Tensors as one list of blocks of equally many numbers, and blocks as tensors again.

Each matrix of a tensor has blocks of its own, so that the codes of a matrix do not
depend on its neighbours; what is left of its last block is filled up with zeros, and so
are whole blocks at the end of the list.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Blocks:
    """How tensors are cut into blocks.

    Args:
        tensors: each (B, ...): B matrices, each with blocks of its own; or 1-D, one
            matrix.
        block: numbers in a block.
        multiple: the number of blocks is a multiple of this.

    Attributes:
        lengths: blocks of each tensor.
        empty: blocks at the end that belong to no tensor.
    """

    def __init__(self, tensors: Sequence[Tensor], block: int, multiple: int = 1) -> None:
        self._block = block
        self._shapes = [tensor.shape for tensor in tensors]
        # matrices of each tensor, and numbers of a matrix
        self._sizes = [_as_matrices(tensor).shape for tensor in tensors]
        self.lengths = [rows * self._of_a_matrix(numel) for rows, numel in self._sizes]
        self.empty = -sum(self.lengths) % multiple

    def __len__(self) -> int:
        return sum(self.lengths) + self.empty

    def written(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the numbers of tensors of the shapes given: (k, block)."""
        blocks = tensors[0].new_zeros(len(self), self._block)
        for view, tensor in zip(self.cut(blocks), tensors, strict=True):
            view.copy_(tensor)
        return blocks

    def cut(self, blocks: Tensor) -> list[Tensor]:
        """Return the tensors that blocks (k, block) hold, as views of these."""
        # the empty blocks come last, and belong to none
        pieces = blocks.split([*self.lengths, self.empty])
        return [
            piece.reshape(rows, -1)[:, :numel].view(shape)
            for piece, (rows, numel), shape in zip(pieces, self._sizes, self._shapes, strict=False)
        ]

    def counts(self, like: Tensor) -> Tensor:
        """Return how many numbers of each block are no filling: (k,), of the dtype and
        device of `like`.
        """
        counts = []
        for rows, numel in self._sizes:
            starts = torch.arange(self._of_a_matrix(numel), device=like.device) * self._block
            counts.append((numel - starts).clamp(max=self._block).to(like.dtype).repeat(rows))
        return torch.cat([*counts, like.new_zeros(self.empty)])

    def _of_a_matrix(self, numel: int) -> int:
        """Count the blocks of a matrix."""
        return -(-numel // self._block)


def _as_matrices(tensor: Tensor) -> Tensor:
    """Return a tensor as (matrices, numbers of each)."""
    return tensor.flatten(1) if tensor.dim() > 1 and tensor.numel() else tensor.reshape(1, -1)
