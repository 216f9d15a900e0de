"""GreedyLore as a public implementation refreshes it: a refresh sends the gradient
alone, and forgets the error.

Source: Chen, He, Li, Jia, Yuan, "GreedyLore", arXiv 2507.08784; github.com/yiran529/
GreedyLore (`subspace_hook.py`). The library's sends gradient and error together. With
the whole basis U of the short side (here columns), each worker i:

    t mod tau == 0:  U = right singular vectors of mean g_i, applied = mean g_i, e_i = 0
    else:            D_i = g_i + e_i
                     score = mean of <D_i u_k, z_k> for Gaussian z_k
                     V = the r columns of U with the largest score^2
                     applied = mean(D_i) V V^T,  e_i = D_i - D_i V V^T

Embeddings and vectors are averaged uncompressed, as there. There is no warm-up unless
`warmup_steps` says so; in it everything is averaged uncompressed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from lowrank_comm.lab.experiment import LabSettings
from lowrank_comm.lab.training.bases import Base, base_optimizer, is_hidden
from lowrank_comm.numerics.randomness import stream


class GreedyLoreReferenceSettings(LabSettings):
    """The numbers of GreedyLore.

    Attributes:
        rank: r.
        restart_every: tau.
        warmup_steps: steps that are averaged uncompressed first.
        embeddings: whether embeddings are compressed, too.
    """

    kind: Literal["greedylore_reference"]
    rank: int = Field(ge=1)
    restart_every: int = Field(ge=1)
    warmup_steps: int = Field(default=0, ge=0)
    embeddings: bool = False


class GreedyLoreReference:
    """The reference's GreedyLore for N workers; see `training.workers.Peer`."""

    clip = True

    def __init__(
        self,
        settings: GreedyLoreReferenceSettings,
        parameters: Mapping[str, Tensor],
        workers: int,
        base: Base,
        seed: int,
    ) -> None:
        self._settings, self._seed, self._step = settings, seed, 0
        self._bases: dict[str, Tensor] = {}
        names = [
            name
            for name, tensor in parameters.items()
            if is_hidden(name, tensor) or (settings.embeddings and tensor.dim() == 2)
        ]
        self._errors = [
            {name: torch.zeros_like(parameters[name]) for name in names} for _ in range(workers)
        ]
        self.optimizer = base_optimizer(parameters, base)
        self.sent: Counter[str] = Counter()

    def average(self, gradients: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        means = {}
        for name in gradients[0]:
            given = [each[name] for each in gradients]
            mean = torch.stack(given).mean(0)
            counted = self._step - self._settings.warmup_steps
            if name not in self._errors[0] or counted < 0:
                self.sent["dense"] += 4 * mean.numel()
                means[name] = mean
            elif counted % self._settings.restart_every == 0:
                means[name] = self._refresh(name, mean)
            else:
                means[name] = self._project(name, given)
        self._step += 1
        return means

    def _refresh(self, name: str, mean: Tensor) -> Tensor:
        """Take the basis of the mean gradient, which is applied whole."""
        tall = mean if mean.shape[0] >= mean.shape[1] else mean.mT
        self._bases[name] = torch.linalg.svd(tall, full_matrices=False).Vh.mT
        for own in self._errors:
            own[name].zero_()
        self.sent["restart"] += 4 * (mean.numel() + self._bases[name].numel())
        return mean

    def _project(self, name: str, gradients: Sequence[Tensor]) -> Tensor:
        """Send the r columns that are probably the largest."""
        u, flipped = self._bases[name], gradients[0].shape[0] < gradients[0].shape[1]
        deltas = [
            (given + own[name]).mT if flipped else given + own[name]
            for own, given in zip(self._errors, gradients, strict=True)
        ]
        coordinates = torch.stack(deltas).mean(0) @ u
        drawn = stream(self._seed, name, self._step, "GreedyLore's probes")
        probes = torch.randn(coordinates.shape, generator=drawn).to(coordinates)
        scores = (coordinates * probes).sum(0).square()
        r = min(self._settings.rank, u.shape[1])
        chosen = scores.topk(r).indices
        v = u[:, chosen]
        for own, delta in zip(self._errors, deltas, strict=True):
            left = delta - delta @ v @ v.mT
            own[name] = left.mT if flipped else left
        applied = coordinates[:, chosen] @ v.mT
        self.sent["factors"] += 4 * (r * coordinates.shape[0] + u.shape[1])
        return applied.mT if flipped else applied
