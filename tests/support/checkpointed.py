"""A small run whose state the tests save and load, and what they compare."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lowrank_comm import CompressedOptimizer, PowerSGD, PowerSGDPlus
from lowrank_comm.compressors.base import Compressor
from tests.support.reference import gradient

COMPRESSORS = [
    PowerSGD(2),
    PowerSGDPlus(2, restart_every=4),
    PowerSGDPlus(2, restart_every=4, restart="randomized", stagger=True),
    PowerSGDPlus(2, restart_every=4, consensus_restart=True),
]

every_compressor = pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)

FIRST, MORE = 6, 10

Arrays = dict[str, np.ndarray]


class Trainer:
    """A plain model under a compressed Adam or SGD, with gradients that are a function
    of (step, worker) and the parameters.
    """

    def __init__(
        self,
        compressor: Compressor,
        dtype: torch.dtype = torch.float64,
        adam: bool = True,
        **options: Any,
    ) -> None:
        self.model = nn.Sequential(nn.Linear(9, 12), nn.Linear(12, 5)).to(dtype)
        with torch.no_grad():
            for k, p in enumerate(self.model.parameters()):
                p.copy_(torch.from_numpy(gradient(tuple(p.shape), 0, 0, 50 + k)))
        named = self.model.named_parameters()
        base = torch.optim.Adam(named, lr=0.01) if adam else torch.optim.SGD(named, lr=0.01)
        self.optimizer = CompressedOptimizer(
            base, compressor=compressor, **({"min_compression_rate": 0} | options)
        )

    def train(self, first: int, steps: int, worker: int, common: bool = False) -> list[Arrays]:
        """common: the gradient has no part of its own, so that the mean is the same
        whatever the number of workers.
        """
        seen = []
        for t in range(first, first + steps):
            for k, p in enumerate(self.model.parameters()):
                p.grad = 0.1 * p.detach() + torch.as_tensor(
                    gradient(tuple(p.shape), t, 0 if common else worker, k), dtype=p.dtype
                )
            self.optimizer.reduce_gradients()
            seen.append(
                {name: p.grad.double().numpy().copy() for name, p in self.model.named_parameters()}
            )
            self.optimizer.step()
        return seen


def saved(what: Any) -> bytes:
    """Through a file, as a user would."""
    buffer = io.BytesIO()
    torch.save(what, buffer)
    return buffer.getvalue()


def read(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=True)


def largest_difference(one: list[Arrays], other: list[Arrays]) -> float:
    return max(
        float(np.abs(a[name] - b[name]).max())
        for a, b in zip(one, other, strict=True)
        for name in a
    )


def everything(trainer: Trainer) -> dict[str, Any]:
    """All that a load may change, as copies."""
    optimizer = trainer.optimizer
    return {
        "errors": {name: e.clone() for name, e in optimizer.error_memory().items()},
        "bases": {
            name: parts["Q"].clone() for name, parts in optimizer.reducer.state.bases().items()
        },
        "moments": [
            optimizer.state[p]["exp_avg"].clone()
            for p in trainer.model.parameters()
            if p in optimizer.state
        ],
        "step": optimizer.reducer.step,
        "rate": optimizer.param_groups[0]["lr"],
    }


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)
