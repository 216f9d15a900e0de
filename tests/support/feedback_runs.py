"""Workers that repeat one compressor on one matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowrank_comm import CompressedOptimizer
from lowrank_comm.compressors.base import Compressor, Context, Result
from tests.support.driver import at, drive
from tests.support.reference import gradient

M, N_COLUMNS = 20, 10


def drawn(t: int, worker: int) -> Tensor:
    return torch.from_numpy(gradient((M, N_COLUMNS), t, worker))


class Run:
    """Workers that repeat a compressor, from t = 0."""

    def __init__(self, compressor: Compressor, workers: int) -> None:
        self.compressor = compressor
        schedule = compressor.schedule({"w": 1})
        self.context = Context(("w",), 0, 0, compressor.rank, restart=schedule is not None, m=M)
        like = torch.empty(0, dtype=torch.float64)
        self.states = [
            compressor.initial_state(self.context, M, N_COLUMNS, like) for _ in range(workers)
        ]

    def step(self, deltas: list[Tensor]) -> Result:
        """The first worker's result; compressors with restarts restart every time."""
        results = drive(
            self.compressor, [delta[None] for delta in deltas], self.states, self.context
        )
        self.states = [result.state for result in results]
        self.context = at(self.compressor, self.context, self.context.t + 1, self.context.restart)
        return results[0]


def optimizer_of(compressor: Compressor, **more: Any) -> CompressedOptimizer:
    w = torch.nn.Parameter(torch.zeros(M, N_COLUMNS, dtype=torch.float64))
    return CompressedOptimizer(
        torch.optim.SGD([("w", w)], lr=0.1), compressor, min_compression_rate=0, **more
    )


def steps(optimizer: CompressedOptimizer, start: int, stop: int) -> Tensor:
    (w,) = optimizer.param_groups[0]["params"]
    for t in range(start, stop):
        w.grad = drawn(t, 0)
        optimizer.step()
    return w.detach().clone()
