"""DeMo: decoupled momentum, of which each worker sends the largest coefficients.

Source: Peng, Chen, Su, Quesnelle, Kingma, Liu, "DeMo: Decoupled Momentum Optimization",
arXiv 2411.19870; its code, github.com/bloc97/DeMo. With chunks of 64 x 64 and their
cosine transform, each worker i:

    M_i  <- beta M_i + eta g_i
    q_i   = the k largest coefficients of each chunk of DCT(M_i)
    M_i  <- M_i - IDCT(q_i)
    U     = IDCT(for each coefficient the mean over the workers that sent it)
    X    <- X - eta sign(U)

The momenta are never averaged: what is not sent stays with its worker. The second
version of the paper calls this a replacement for the momentum of any optimizer; its
full text was not at hand. Under Muon the hidden matrices' step is therefore Muon's
orthonormal one of U, and sign is that of the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.optim import SGD

from lowrank_comm.lab.experiment import LabSettings
from lowrank_comm.lab.peers.chunks import Chunks, largest
from lowrank_comm.lab.training.bases import Base, Together, is_hidden, muon


class DeMoSettings(LabSettings):
    """DeMo's numbers; the defaults are those of its code.

    Attributes:
        k: coefficients of a chunk that are sent.
        chunk: side of a chunk.
        decay: beta.
    """

    kind: Literal["demo"]
    k: int = Field(default=32, ge=1)
    chunk: int = Field(default=64, ge=1)
    decay: float = Field(default=0.999, ge=0, lt=1)


class DeMo:
    """DeMo for N workers; see `training.workers.Peer`."""

    clip = False

    def __init__(
        self, settings: DeMoSettings, parameters: Mapping[str, Tensor], workers: int, base: Base
    ) -> None:
        self._settings = settings
        self._chunks = {
            name: Chunks(tensor.shape, settings.chunk, transformed=True)
            for name, tensor in parameters.items()
        }
        self._momenta = [
            {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
            for _ in range(workers)
        ]
        self._orthogonal = {
            name
            for name, tensor in parameters.items()
            if base.name == "muon" and is_hidden(name, tensor)
        }
        hidden = [parameters[name] for name in self._orthogonal]
        rest = [tensor for name, tensor in parameters.items() if name not in self._orthogonal]
        sign = SGD(rest, lr=base.rate)
        self.optimizer = Together(muon(hidden, base, 0.0), sign) if hidden else Together(sign)
        self.sent: Counter[str] = Counter()

    def average(self, gradients: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        # eta: all groups have one
        rate = self.optimizer.param_groups[0]["lr"]
        means = {}
        for name, chunks in self._chunks.items():
            total = torch.zeros(0)
            for momenta, given in zip(self._momenta, gradients, strict=True):
                momentum = momenta[name].mul_(self._settings.decay).add_(given[name], alpha=rate)
                found = chunks.cut(momentum)
                places, values = largest(found, self._settings.k)
                if momenta is self._momenta[0]:
                    total, senders = torch.zeros_like(found), torch.zeros_like(found)
                    self._count(chunks, values)
                sent = torch.zeros_like(found).scatter_(1, places, values)
                momentum.sub_(chunks.join(sent))
                total += sent
                senders.scatter_add_(1, places, torch.ones_like(values))
            update = chunks.join(total / senders.clamp(min=1))
            means[name] = update if name in self._orthogonal else update.sign()
        return means

    def _count(self, chunks: Chunks, values: Tensor) -> None:
        """Count values in float32 and packed indices."""
        count, k = values.shape
        self.sent["gather"] += round(count * (4 * k + chunks.index_bytes(k)))
