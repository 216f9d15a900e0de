"""What the tests of schemes that project on a subspace share: N workers by hand, and
means over many draws.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_comm.compressors.base import Compressor, Context, Result
from tests.support.driver import at, dense, drive
from tests.support.reference import gradient


class ByHand:
    """N workers that repeat `drive` on matrices of one shape, with or without error
    feedback.
    """

    def __init__(
        self,
        compressor: Compressor,
        names: tuple[str, ...],
        shape: tuple[int, int],
        workers: int,
        ef: bool,
    ):
        self.compressor, self.names, self.shape, self.ef, self.t = compressor, names, shape, ef, 0
        self.rank = min(compressor.rank, *shape)
        like = torch.empty(0, dtype=torch.float64)
        context = Context(names, -1, 0, self.rank, m=shape[0])
        self.states = [compressor.initial_state(context, *shape, like) for _ in range(workers)]
        self.errors = [torch.zeros(len(names), *shape, dtype=torch.float64) for _ in range(workers)]

    def step(self, gradients: Sequence[Tensor]) -> list[Result]:
        schedule = self.compressor.schedule(dict.fromkeys(self.names, 1))
        due = schedule is not None and schedule.due(self.names[0], self.t)
        context = at(
            self.compressor, Context(self.names, self.t, 0, self.rank, m=self.shape[0]), self.t, due
        )
        deltas = [g + e for g, e in zip(gradients, self.errors, strict=True)]
        results = drive(self.compressor, deltas, self.states, context)
        self.states = [result.state for result in results]
        if self.ef:
            self.errors = [
                delta - dense(result.sent) for delta, result in zip(deltas, results, strict=True)
            ]
        self.t += 1
        return results


def given(shape: tuple[int, ...], t: int, workers: int) -> list[Tensor]:
    return [torch.from_numpy(gradient(shape, t, worker)) for worker in range(workers)]


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


def draws(compressor: Compressor, matrix: Tensor, count: int) -> Tensor:
    """C(matrix) for `count` draws of the subspace."""
    names = tuple(f"w{k}" for k in range(count))
    return dense(
        ByHand(compressor, names, tuple(matrix.shape), 1, False)
        .step([matrix.expand(count, -1, -1)])[0]
        .applied
    )


def distance_in_standard_errors(sample: Tensor, expected: Tensor) -> float:
    """Of the mean of the sample, at the worst entry."""
    error = sample.std(dim=0) / len(sample) ** 0.5
    return float(((sample.mean(dim=0) - expected).abs() / error).max())
