"""Averages that are sent quantized: the quantized part of a packet.

    1. Every tensor is written in blocks (`quantization.Format`); all tensors of one
       format are one list of blocks, dealt out among the workers in equal shares of
       consecutive blocks.
    2. all-to-all: each worker receives everyone's codes of its share, and decodes and
       averages them in their order.
    3. It rounds the mean to codes; all-gather: everyone receives the means of all
       shares.

What a worker sent is what its codes decode to. On its own share it also sent N (rounded
mean - mean): so the mean of what was sent is what all apply, and the second rounding,
too, stays in an error memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowrank_comm.communication.collectives import AllGather, AllToAll, Exchange
from lowrank_comm.numerics.quantization import Format

Noise = Callable[[str, tuple[int, ...], torch.device], Tensor]


class QuantizedMean:
    """Tensors of one format, dtype and device on their way to their mean.

    Args:
        format: how they are written.
        tensors: each (B, ...): B matrices, each with blocks of its own; or 1-D, one
            matrix.
        workers, rank: of the group.
        noise: (purpose, shape, device) -> uniform draws for stochastic rounding, or
            None for the nearest code.

    Attributes:
        blocks: (k, block), the numbers to be averaged.
        bytes: of each tensor, as if its codes were summed by an all-reduce: the two
            legs carry as much over each link.
        filling: bytes of the empty blocks (fewer than N) that make all shares alike.
    """

    def __init__(
        self, format: Format, tensors: list[Tensor], workers: int, rank: int, noise: Noise | None
    ) -> None:
        self._format, self._workers, self._rank, self._noise = format, workers, rank, noise
        matrices = [_as_matrices(tensor) for tensor in tensors]
        self._shapes = [
            (matrix.shape, tensor.shape) for matrix, tensor in zip(matrices, tensors, strict=True)
        ]
        self.bytes = [rows * format.bytes(numel) for (rows, numel), _ in self._shapes]
        parts, counts = zip(*map(self._in_blocks, matrices), strict=True)
        self._lengths = [len(part) for part in parts]
        empty = -sum(self._lengths) % workers
        self._lengths.append(empty)
        self._share = sum(self._lengths) // workers
        self.filling = empty * format.block_bytes
        like = parts[0]
        self.blocks = torch.cat([*parts, like.new_zeros(empty, format.block)])
        self._counts = torch.cat([*counts, like.new_zeros(empty)])

    def scatter(self) -> Exchange:
        """Quantize the tensors, and return the all-to-all of step 2."""
        codes = self._format.encode(self.blocks, self._counts, self._draw("codes", self.blocks))
        self._own = self._format.decode(codes, self.blocks.dtype)
        given = codes.view(self._workers, -1)
        self._received = torch.empty_like(given)
        return AllToAll(given, self._received)

    def gather(self) -> Exchange:
        """Average this worker's share, and return the all-gather of step 3."""
        dtype = self.blocks.dtype
        mine = slice(self._rank * self._share, (self._rank + 1) * self._share)
        mean = self.blocks.new_zeros(self._share, self._format.block)
        # one after the other: as much room as one share
        for codes in self._received:
            mean += self._format.decode(codes.view(self._share, self._format.block_bytes), dtype)
        mean /= self._workers
        places = torch.arange(self._format.block, device=mean.device)
        mean.masked_fill_(places >= self._counts[mine].unsqueeze(1), 0)
        written = self._format.encode(mean, self._counts[mine], self._draw("mean", mean))
        self._own[mine] += self._workers * (self._format.decode(written, dtype) - mean)
        self._everyone = torch.empty(
            self._workers, written.numel(), dtype=torch.uint8, device=mean.device
        )
        return AllGather(written.view(-1), self._everyone)

    def decode(self) -> Tensor:
        """Return the mean of all blocks, after step 3."""
        self._mean = self._format.decode(
            self._everyone.view(-1, self._format.block_bytes), self.blocks.dtype
        )
        return self._mean

    def answers(self) -> list[tuple[Tensor, Tensor]]:
        """Return (mean, own as sent) of each tensor."""
        return list(zip(self._of_tensors(self._mean), self._of_tensors(self._own), strict=True))

    def _of_tensors(self, blocks: Tensor) -> list[Tensor]:
        """Cut the blocks of all tensors into tensors of their shapes."""
        # the empty blocks come last, and belong to none
        return [
            piece.reshape(rows, -1)[:, :numel].reshape(shape)
            for piece, ((rows, numel), shape) in zip(
                blocks.split(self._lengths), self._shapes, strict=False
            )
        ]

    def _in_blocks(self, matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Return (k, block) numbers, and (k,) how many of each block are real."""
        rows, numel = matrix.shape
        blocks, size = self._format.blocks(numel), self._format.block
        padded = matrix.new_zeros(rows, blocks * size)
        padded[:, :numel] = matrix
        starts = torch.arange(blocks, device=matrix.device) * size
        counts = (numel - starts).clamp(max=size).to(matrix.dtype).repeat(rows)
        return padded.view(-1, size), counts

    def _draw(self, purpose: str, like: Tensor) -> Tensor | None:
        if self._noise is None:
            return None
        # a packet may hold codes of several kinds
        whose = f"{purpose} in {self._format.name} of {like.dtype}"
        return self._noise(whose, tuple(like.shape), like.device)


def _as_matrices(tensor: Tensor) -> Tensor:
    """Return a tensor as (matrices, numbers of each)."""
    return tensor.flatten(1) if tensor.dim() > 1 and tensor.numel() else tensor.reshape(1, -1)
