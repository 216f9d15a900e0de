"""Averages that are sent quantized: the quantized part of a packet.

Every tensor is written in blocks (`quantization.Format`); all tensors of one format are
one list of blocks (`blocks`). Between few workers (`GATHERED_UP_TO`) codes take one
leg:

    1. all-gather: everyone receives everyone's codes, decodes and averages them.

What a worker sent is what its codes decode to, and the mean of what was sent is what
all apply. Between more workers that would put N / 2 times as many bytes on each link as
an all-reduce does, and codes take two legs:

    1. all-to-all: the blocks are dealt out among the workers in equal shares of
       consecutive blocks. Each worker receives everyone's codes of its share, and
       decodes and averages them in their order.
    2. all-gather: it rounds the mean to codes; everyone receives the means of all
       shares.

On its own share a worker then also sent N (rounded mean - mean): so the mean of what
was sent is what all apply, and the second rounding, too, stays in an error memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lowrank_comm.communication.blocks import Blocks
from lowrank_comm.communication.collectives import AllGather, AllToAll, Exchange
from lowrank_comm.numerics.quantization import Format

Noise = Callable[[str, tuple[int, ...], torch.device], Tensor]
GATHERED_UP_TO = 2
"""Workers between whom codes are gathered: as many as it costs no byte more. Of k bytes
of codes a gather puts (N - 1) k on each link and the two legs 2 (N - 1) / N k, so that
a collective less costs (N - 1) (N - 2) / N k bytes: none for N = 2, 1.5 k for N = 4.
"""


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
        bytes: of the codes of each tensor.
        surplus: bytes that the legs carry over each link beyond an all-reduce of
            `bytes`: of the gather, (N / 2 - 1) times these; of two legs those of the
            empty blocks (fewer than N) that make all shares alike.
    """

    def __init__(
        self, format: Format, tensors: list[Tensor], workers: int, rank: int, noise: Noise | None
    ) -> None:
        self._format, self._workers, self._rank, self._noise = format, workers, rank, noise
        self._gathers = workers <= GATHERED_UP_TO
        self._blocks = Blocks(tensors, format.block, 1 if self._gathers else workers)
        self._dtype = tensors[0].dtype
        self.bytes = [length * format.block_bytes for length in self._blocks.lengths]
        self.surplus = float(self._blocks.empty * format.block_bytes)
        if self._gathers:
            self.surplus = sum(self.bytes) * max(workers / 2 - 1, 0.0)
        numbers = self._blocks.written(tensors)
        self._counts = self._blocks.counts(numbers) if format.averages else None
        self._codes = format.encode(numbers, self._counts, self._draw("codes", numbers))
        self._mean: Tensor
        self._own: Tensor

    def largest(self) -> Tensor:
        """Return a number for each block that is sent, or has arrived: the size that
        its largest code decodes to.
        """
        return self._format.largest(self._codes.view(-1, self._format.block_bytes))

    def first_leg(self) -> Exchange:
        """Return the all-gather of codes, or the all-to-all."""
        codes = self._codes
        if self._gathers:
            self._received = codes.new_empty(self._workers, codes.numel())
            return AllGather(codes.view(-1), self._received)
        given = codes.view(self._workers, codes.numel() // self._workers)
        self._received = torch.empty_like(given)
        return AllToAll(given, self._received)

    def second_leg(self) -> Exchange | None:
        """Average this worker's share, and return the all-gather of the means; None
        where the first leg was all.
        """
        if self._gathers:
            return None
        self._own = self._decoded(self._codes)
        share = len(self._blocks) // self._workers
        self._mine = slice(self._rank * share, (self._rank + 1) * share)
        everyones = self._decoded(self._received)
        mean = everyones.view(self._workers, share, self._format.block).mean(dim=0)
        # as large as all tensors together
        del everyones
        counts = None
        if self._counts is not None:
            counts = self._counts[self._mine]
            places = torch.arange(self._format.block, device=mean.device)
            mean.masked_fill_(places >= counts.unsqueeze(1), 0)
        codes = self._format.encode(mean, counts, self._draw("mean", mean))
        self._share_mean = mean
        self._received = codes.new_empty(self._workers, codes.numel())
        return AllGather(codes.view(-1), self._received)

    def decode(self) -> None:
        """Form the means, once the last leg was carried out."""
        if self._gathers:
            self._average_all()
            self._codes = self._received
            return
        self._codes = self._received.view(len(self._blocks), self._format.block_bytes)
        self._mean = self._decoded(self._codes)
        taken_off = self._mean[self._mine] - self._share_mean
        self._own[self._mine].add_(taken_off, alpha=self._workers)

    def _average_all(self) -> None:
        """Average everyone's codes in one order on all workers, for the same bits."""
        total: Tensor | None = None
        for worker, codes in enumerate(self._received):
            numbers = self._decoded(codes)
            if worker == self._rank:
                self._own = numbers
            total = numbers if total is None else total + numbers
        assert total is not None
        # of one worker, `total` is what it sent
        self._mean = total / self._workers if self._workers == 1 else total.div_(self._workers)

    def answers(self) -> list[tuple[Tensor, Tensor]]:
        """Return (mean, own as sent) of each tensor, once the means are formed."""
        return list(zip(self._blocks.cut(self._mean), self._blocks.cut(self._own), strict=True))

    def _decoded(self, codes: Tensor) -> Tensor:
        return self._format.decode(codes.view(-1, self._format.block_bytes), self._dtype)

    def _draw(self, purpose: str, like: Tensor) -> Tensor | None:
        if self._noise is None:
            return None
        # a packet may hold codes of several kinds
        whose = f"{purpose} in {self._format.name} of {like.dtype}"
        return self._noise(whose, tuple(like.shape), like.device)
