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
        filling: bytes of the empty blocks (fewer than N) that make all shares alike.
    """

    def __init__(
        self, format: Format, tensors: list[Tensor], workers: int, rank: int, noise: Noise | None
    ) -> None:
        self._format, self._workers, self._rank, self._noise = format, workers, rank, noise
        self._tensors = tensors
        parts, counts = zip(*(self._in_blocks(tensor) for tensor in tensors), strict=True)
        self._share = -(-sum(part.shape[0] for part in parts) // workers)
        empty = self._share * workers - sum(part.shape[0] for part in parts)
        self.filling = empty * format.block_bytes
        like = parts[0]
        self._blocks = torch.cat([*parts, like.new_zeros(empty, format.block)])
        self._counts = torch.cat([*counts, like.new_zeros(empty)])
        self._mean: Tensor | None = None

    @property
    def bytes(self) -> list[int]:
        """Bytes of each tensor, as if its codes were summed by an all-reduce: the two
        legs carry as much over each link.
        """
        return [self._rows(t)[0] * self._format.bytes(self._rows(t)[1]) for t in self._tensors]

    @property
    def numbers(self) -> Tensor:
        """The numbers to be averaged, for a check that they are finite."""
        return self._blocks

    def scatter(self) -> Exchange:
        """Quantize the tensors, and return the all-to-all of step 2."""
        codes = self._format.encode(self._blocks, self._counts, self._draw("codes", self._blocks))
        self._own = self._format.decode(codes, self._blocks.dtype)
        given = codes.view(self._workers, -1)
        self._received = torch.empty_like(given)
        return AllToAll(given, self._received)

    def gather(self) -> Exchange:
        """Average this worker's share, and return the all-gather of step 3."""
        dtype = self._blocks.dtype
        mine = slice(self._rank * self._share, (self._rank + 1) * self._share)
        mean = torch.zeros(self._share, self._format.block, dtype=dtype, device=self._blocks.device)
        # one after the other: as much room as one share
        for codes in self._received:
            mean += self._format.decode(codes.view(self._share, self._format.block_bytes), dtype)
        mean /= self._workers
        inside = torch.arange(self._format.block, device=mean.device) < self._counts[
            mine
        ].unsqueeze(1)
        mean = torch.where(inside, mean, torch.zeros_like(mean))
        written = self._format.encode(mean, self._counts[mine], self._draw("mean", mean))
        self._own[mine] += self._workers * (self._format.decode(written, dtype) - mean)
        self._everyone = torch.empty(
            self._workers, written.numel(), dtype=torch.uint8, device=mean.device
        )
        return AllGather(written.view(-1), self._everyone)

    def decode(self) -> Tensor:
        """Return the mean of all blocks, after step 3."""
        self._mean = self._format.decode(
            self._everyone.view(-1, self._format.block_bytes), self._blocks.dtype
        )
        return self._mean

    def answers(self) -> list[tuple[Tensor, Tensor]]:
        """Return (mean, own as sent) of each tensor."""
        assert self._mean is not None
        result, start = [], 0
        for tensor in self._tensors:
            rows, numel = self._rows(tensor)
            stop = start + rows * self._format.blocks(numel)
            pair = [
                part[start:stop].reshape(rows, -1)[:, :numel].reshape(tensor.shape)
                for part in (self._mean, self._own)
            ]
            result.append((pair[0], pair[1]))
            start = stop
        return result

    def _rows(self, tensor: Tensor) -> tuple[int, int]:
        """Return how many matrices a tensor holds, and the numbers of each."""
        if tensor.dim() < 2 or not tensor.numel():
            return 1, tensor.numel()
        return tensor.shape[0], tensor.numel() // tensor.shape[0]

    def _in_blocks(self, tensor: Tensor) -> tuple[Tensor, Tensor]:
        """Return (k, block) numbers, and (k,) how many of each block are real."""
        rows, numel = self._rows(tensor)
        blocks, size = self._format.blocks(numel), self._format.block
        padded = tensor.new_zeros(rows, blocks * size)
        padded[:, :numel] = tensor.reshape(rows, numel)
        starts = torch.arange(blocks, device=tensor.device) * size
        counts = (numel - starts).clamp(max=size).to(tensor.dtype).repeat(rows)
        return padded.view(-1, size), counts

    def _draw(self, purpose: str, like: Tensor) -> Tensor | None:
        if self._noise is None:
            return None
        # a packet may hold codes of several kinds
        whose = f"{purpose} in {self._format.name} of {like.dtype}"
        return self._noise(whose, tuple(like.shape), like.device)
