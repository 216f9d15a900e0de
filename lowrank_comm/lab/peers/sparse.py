"""SparseLoCo's step without local steps: the largest numbers of a decayed error memory,
in two bits each.

Source: Sarfi, Therien, Lidin, Belilovsky, "Communication Efficient LLM Pre-training
with SparseLoCo", arXiv 2508.15706, and the code of its authors. With chunks of 64 x 64,
each worker i:

    e_i  <- beta e_i + g_i
    q_i   = Q(the k largest numbers of each chunk of e_i)
    e_i  <- e_i - q_i
    the base optimizer's gradient is the mean of the q_i over all workers

There g_i is what a worker's H steps of AdamW have changed, and the outer optimizer is
plain descent; here H = 1 step is taken by the base after the averaging, so that the
method is a compressor like the others. Q is theirs: values, less their mean, fall into
2^bits bins of equal width over six standard deviations, and a bin's value is the mean
of what fell into it; the table of these is sent along.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lowrank_comm.lab.experiment import LabSettings
from lowrank_comm.lab.peers.chunks import Chunks, largest
from lowrank_comm.lab.training.bases import Base, base_optimizer

SIGMAS = 6.0
"""Width of all bins together, in standard deviations."""


class SparseSettings(LabSettings):
    """Numbers of the step.

    Attributes:
        k: numbers of a chunk that are sent.
        chunk: side of a chunk.
        decay: beta, which takes the place of an outer momentum.
        bits: of a value; null for float32.
    """

    kind: Literal["sparse"]
    k: int = Field(default=64, ge=1)
    chunk: int = Field(default=64, ge=1)
    decay: float = Field(default=0.95, ge=0, le=1)
    bits: int | None = Field(default=2, ge=1, le=8)


class Sparse:
    """SparseLoCo's step for N workers; see `training.workers.Peer`."""

    clip = True

    def __init__(
        self, settings: SparseSettings, parameters: Mapping[str, Tensor], workers: int, base: Base
    ) -> None:
        self._settings = settings
        self._chunks = {
            name: Chunks(tensor.shape, settings.chunk, transformed=False)
            for name, tensor in parameters.items()
        }
        self._errors = [
            {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
            for _ in range(workers)
        ]
        self.optimizer = base_optimizer(parameters, base)
        self.sent: Counter[str] = Counter()

    def average(self, gradients: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        means = {}
        for name, chunks in self._chunks.items():
            total = torch.zeros(0)
            for errors, given in zip(self._errors, gradients, strict=True):
                error = errors[name].mul_(self._settings.decay).add_(given[name])
                found = chunks.cut(error)
                places, values = largest(found, self._settings.k)
                if self._settings.bits is not None:
                    values = binned(values, self._settings.bits)
                if errors is self._errors[0]:
                    total = torch.zeros_like(found)
                    self._count(chunks, values)
                sent = torch.zeros_like(found).scatter_(1, places, values)
                error.sub_(chunks.join(sent))
                total += sent
            means[name] = chunks.join(total / len(gradients))
        return means

    def _count(self, chunks: Chunks, values: Tensor) -> None:
        """Count codes and packed indices, and the tensor's table and mean."""
        count, k = values.shape
        bits = self._settings.bits
        table = 0 if bits is None else 4 * (2**bits + 1)
        width = 4 if bits is None else bits / 8
        self.sent["gather"] += round(count * (k * width + chunks.index_bytes(k)) + table)


def binned(values: Tensor, bits: int) -> Tensor:
    """Return what values come to in 2^bits bins; see the top of this file."""
    bins, mean = 2**bits, values.mean()
    centred = values - mean
    if values.numel() < 2 or not (scale := SIGMAS * centred.std() / bins) > 0:
        return mean.expand_as(values)
    codes = (centred / scale + bins // 2).round().clamp(0, bins - 1).long()
    table = torch.zeros(bins, dtype=values.dtype).scatter_reduce_(
        0, codes.view(-1), centred.reshape(-1), "mean", include_self=False
    )
    return table[codes] + mean
