"""Dion and Orth-Dion: an orthonormal step of low rank, whose factors are all that is
sent.

Source: Ahn, Xu, Abreu, Langford, "Dion: Distributed Orthonormalized Updates", arXiv
2504.05295, and its code, github.com/microsoft/dion (`dion_reference.py`); Nakamori et
al., "Orth-Dion", arXiv 2605.16341. For a hidden matrix of m x n, with Q of n x r kept
from the step before, each worker i:

    M_i <- M_i + g_i
    P    = orth(mean of M_i Q)
    R    = mean of M_i^T P
    M_i <- M_i - (1 - mu) P R^T
    Q    = R with columns of length 1         (Dion)
    Q    = orth(R)                            (Orth-Dion)
    X   <- X - eta sqrt(m / n) P Q^T

Embeddings and vectors are averaged uncompressed and stepped by AdamW, at the rate that
dense training found; with `embeddings` the embeddings are taken for a hidden matrix.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import SGD

from lowrank_comm.lab.experiment import LabSettings
from lowrank_comm.lab.training.bases import Base, Together, adamw, is_hidden
from lowrank_comm.numerics.randomness import stream


class DionSettings(LabSettings):
    """Dion's numbers.

    Attributes:
        rank: r.
        momentum: mu.
        orthonormal: whether Q is orthonormal, as in Orth-Dion.
        embeddings: whether embeddings are compressed, too.
    """

    kind: Literal["dion"]
    rank: int = Field(default=4, ge=1)
    momentum: float = Field(default=0.95, ge=0, le=1)
    orthonormal: bool = False
    embeddings: bool = False


class Dion:
    """Dion for N workers; see `training.workers.Peer`."""

    # an orthonormal step has no length to clip
    clip = False

    def __init__(
        self,
        settings: DionSettings,
        parameters: Mapping[str, Tensor],
        workers: int,
        base: Base,
        dense_rate: float,
        seed: int,
    ) -> None:
        self._settings = settings
        self._bases: dict[str, Tensor] = {}
        for name, tensor in parameters.items():
            if is_hidden(name, tensor) or (settings.embeddings and tensor.dim() == 2):
                n, r = tensor.shape[1], min(settings.rank, *tensor.shape)
                drawn = torch.randn(n, r, generator=stream(seed, name, 0, "Dion's Q"))
                self._bases[name] = drawn.to(tensor)
        self._momenta = [
            {name: torch.zeros_like(parameters[name]) for name in self._bases}
            for _ in range(workers)
        ]
        matrices = SGD([parameters[name] for name in self._bases], lr=base.rate)
        rest = [tensor for name, tensor in parameters.items() if name not in self._bases]
        own = replace(base, rate=dense_rate)
        self.optimizer = Together(matrices, *([adamw(rest, own)] if rest else []))
        self.sent: Counter[str] = Counter()

    def average(self, gradients: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        means = {}
        for name in gradients[0]:
            if name in self._bases:
                means[name] = self._step(name, [given[name] for given in gradients])
            else:
                means[name] = torch.stack([given[name] for given in gradients]).mean(0)
                self.sent["dense"] += 4 * means[name].numel()
        return means

    def _step(self, name: str, gradients: Sequence[Tensor]) -> Tensor:
        """Return the step of one matrix, and carry its momenta and basis on."""
        momenta = [
            own[name].add_(given) for own, given in zip(self._momenta, gradients, strict=True)
        ]
        mean = torch.stack(momenta).mean(0)
        p = torch.linalg.qr(mean @ self._bases[name]).Q
        factor = mean.mT @ p
        for momentum in momenta:
            momentum.addmm_(p, factor.mT, alpha=self._settings.momentum - 1)
        if self._settings.orthonormal:
            q = torch.linalg.qr(factor).Q
        else:
            q = factor / (factor.norm(dim=0, keepdim=True) + 1e-8)
        self._bases[name] = q
        m, n = mean.shape
        self.sent["factors"] += 4 * q.shape[1] * (m + n)
        return math.sqrt(m / n) * (p @ q.mT)
