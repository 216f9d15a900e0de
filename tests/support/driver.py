"""The smallest driver of a compressor's generators: N workers in one process, answers
in plain arithmetic. No reducer, no buffers, no group.

The tests hold the library's reducer against it, and look with it at what a compressor
returns (what was sent, what was applied). And one step of the real optimizer, recorded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lowrank_comm import CompressedOptimizer
from lowrank_comm.compressors.base import Compressor, Context, Delta, Result, State, Steps
from lowrank_comm.compressors.requests import (
    ComputeOnce,
    Gather,
    InverseFactor,
    Mean,
    Read,
    Request,
    SumOverRows,
    WholeRows,
)
from lowrank_comm.compressors.restart_schedule import steady
from lowrank_comm.numerics.linalg import inverse_factor
from lowrank_comm.simulation import Simulation


def drive(
    compressor: Compressor, deltas: Sequence[Tensor], states: Sequence[State], context: Context
) -> list[Result]:
    """One step of one batch for every worker. deltas: (B, m, n) for each worker.
    Returns each worker's result.
    """
    contexts = [replace(context, worker=k, workers=len(deltas)) for k in range(len(deltas))]
    runs = [
        compressor.step(Delta(d), state, one)
        for d, state, one in zip(deltas, states, contexts, strict=True)
    ]
    results: list[Result] = []
    asked: list[Request] = [next(run) for run in runs]
    while not results:
        first = asked[0]
        if isinstance(first, Mean):
            mean = torch.stack([request.tensor for request in asked]).mean(0)
            answers = [(mean, request.tensor) for request in asked]
        elif isinstance(first, ComputeOnce):
            answers = [first.of(first.matrices, list(range(len(first.matrices))))] * len(runs)
        elif isinstance(first, Gather):
            answers = [torch.stack([request.tensor for request in asked])] * len(runs)
        elif isinstance(first, Read):
            answers = [first.tensor.tolist()] * len(runs)
        elif isinstance(first, SumOverRows | WholeRows):
            answers = [request.tensor for request in asked]
        elif isinstance(first, InverseFactor):
            answers = [inverse_factor(first.gram.double(), first.dtype, first.pivot)] * len(runs)
        else:
            answers = [bool((first.tensor > first.limit).all())] * len(runs)
        asked = []
        for run, answer in zip(runs, answers, strict=True):
            reply = _send(run, answer)
            (results if isinstance(reply, Result) else asked).append(reply)
    assert len(results) == len(runs), "workers of one batch must ask the same number of times"
    return results


def _send(run: Steps, answer: object) -> Request | Result:
    """The generator's next request, or its result."""
    try:
        return run.send(answer)
    except StopIteration as end:
        return end.value


def at(compressor: Compressor, context: Context, t: int, restart: bool) -> Context:
    """The context of step t of matrices that have had a gradient in every step."""
    variant = compressor.variant(steady(compressor.schedule({}), context.names[0], t), restart)
    return replace(context, t=t, restart=restart, variant=variant)


def elements_at(compressor: Compressor, m: int, n: int, r: int, t: int, restart: bool) -> int:
    """Count the elements of step t exactly, for a matrix that has had a gradient in
    every step.
    """
    variant = compressor.variant(steady(compressor.schedule({}), "", t), restart)
    return compressor.elements_in(m, n, r, variant, restart)


def dense(value: object) -> Tensor:
    """A result's `applied` or `sent` as a full tensor."""
    return value if isinstance(value, Tensor) else value.dense()  # type: ignore[attr-defined]


class Workers:
    """N workers that repeat `drive` with error feedback on a batch of named matrices of
    one shape.
    """

    def __init__(
        self,
        compressor: Compressor,
        names: tuple[str, ...],
        workers: int,
        basis: Tensor,
        seed: int = 0,
    ) -> None:
        self.compressor, self.names, self.seed, self.t = compressor, names, seed, 0
        self.rank = basis.shape[-1]
        self.states: list[State] = [{"Q": basis.clone()} for _ in range(workers)]
        self.errors: list[Tensor] | None = None

    def step(self, gradients: Sequence[Tensor]) -> list[Result]:
        """gradients: (B, m, n) for each worker. `errors` is e_{t+1} afterwards."""
        errors = (
            self.errors if self.errors is not None else [torch.zeros_like(g) for g in gradients]
        )
        schedule = self.compressor.schedule(dict.fromkeys(self.names, 1))
        restart = schedule is not None and schedule.due(self.names[0], self.t)
        context = at(
            self.compressor, Context(self.names, self.t, self.seed, self.rank), self.t, restart
        )
        deltas = [g + e for g, e in zip(gradients, errors, strict=True)]
        results = drive(self.compressor, deltas, self.states, context)
        self.states = [result.state for result in results]
        self.errors = [
            delta - dense(result.sent) if result.kept is None else result.kept
            for delta, result in zip(deltas, results, strict=True)
        ]
        self.t += 1
        return results


def recorded_step(
    optimizer: CompressedOptimizer, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, dict[str, np.ndarray]]:
    """A step on this rank: the averaged compressed gradient, this worker's error memory
    and the parameters after it.
    """
    optimizer.reduce_gradients()
    applied = {name: p.grad.numpy().copy() for name, p in parameters.items()}
    optimizer.step()
    return {
        "applied": applied,
        "error": {name: e.numpy().copy() for name, e in optimizer.error_memory().items()},
        "parameter": {name: p.detach().numpy().copy() for name, p in parameters.items()},
    }


def simulation(
    compressor: Compressor, shapes: Mapping[str, Sequence[int]], workers: int = 1, **options: Any
) -> Simulation:
    """The library's simulation with every matrix compressed, in float64 unless told."""
    return Simulation(
        shapes,
        compressor,
        workers,
        **({"dtype": torch.float64, "min_compression_rate": 0} | options),
    )
