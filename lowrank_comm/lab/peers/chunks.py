"""Chunks of a matrix, of which DeMo and SparseLoCo send the k largest numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


class Chunks:
    """Cuts tensors of one shape into chunks of at most size x size (size for vectors).

    The side of a chunk is the largest divisor of the tensor's side that is at most
    `size`, as in DeMo's code.

    Args:
        shape: of the tensors, one or two dimensions.
        size: largest side.
        transformed: whether a chunk is given by its discrete cosine transform (type II,
            orthonormal, along every dimension) and not by its own numbers.
    """

    def __init__(self, shape: Sequence[int], size: int, transformed: bool) -> None:
        self.shape = tuple(shape)
        self.sides = [largest_divisor(side, size) for side in shape]
        self.numel = math.prod(self.sides)
        self._bases = [cosines(side) for side in self.sides] if transformed else None

    def cut(self, x: Tensor) -> Tensor:
        """Return the chunks, (count, numel)."""
        if len(self.shape) == 1:
            rows = x.reshape(-1, self.sides[0])
            return rows @ self._bases[0].mT if self._bases else rows
        (m, n), (h, w) = self.shape, self.sides
        chunks = x.reshape(m // h, h, n // w, w).transpose(1, 2)
        if self._bases:
            chunks = self._bases[0] @ chunks @ self._bases[1].mT
        return chunks.reshape(-1, self.numel)

    def join(self, chunks: Tensor) -> Tensor:
        """Return the tensor of these chunks; the inverse of `cut`."""
        if len(self.shape) == 1:
            rows = chunks @ self._bases[0] if self._bases else chunks
            return rows.reshape(self.shape)
        (m, n), (h, w) = self.shape, self.sides
        squares = chunks.reshape(m // h, n // w, h, w)
        if self._bases:
            squares = self._bases[0].mT @ squares @ self._bases[1]
        return squares.transpose(1, 2).reshape(self.shape)

    def index_bytes(self, k: int) -> float:
        """Return the bytes that say which k numbers of a chunk are sent, packed; none
        where all are.
        """
        return 0.0 if k >= self.numel else k * math.ceil(math.log2(self.numel)) / 8


def largest(chunks: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return indices and values of the k largest numbers of each chunk, by size."""
    places = chunks.abs().topk(min(k, chunks.shape[1]), dim=1, sorted=False).indices
    return places, chunks.gather(1, places)


def largest_divisor(side: int, size: int) -> int:
    """Return the largest divisor of `side` that is at most `size`."""
    return next(d for d in range(min(side, size), 0, -1) if side % d == 0)


def cosines(side: int) -> Tensor:
    """Return the orthonormal DCT-II as a matrix: D x are the coefficients of x."""
    k, j = torch.arange(side).view(-1, 1), torch.arange(side)
    waves = torch.cos(math.pi * k * (2 * j + 1) / (2 * side)) * math.sqrt(2 / side)
    waves[0] /= math.sqrt(2)
    return waves
