"""How far the workers' error memories drift apart, and what a 16-bit memory loses.

Worker i's gradient is C_t + heterogeneity H_i + noise xi_(i,t): C_t common with
singular values 1/k, falling as 1 / sqrt(1 + t / 100); the H_i differ between workers,
are the same in every step, and sum to zero; entries of H_i and xi are standard normal.
The memory is e_i = e_bar + d_i. A compressor that is linear, given its basis, uses
e_bar only: d_i costs nothing but precision, and 16 bits have little of that. Two forms
of the memory:

    local:     e_i = Delta_i - P~ Q_i^T     the paper's, and this library's
    averaged:  e_i = Delta_i - P~ Q^T       of public implementations

The second is a control, which the library does not offer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lowrank_comm.compressors.base import Compressor, Context, Delta, State, Steps
from lowrank_comm.compressors.powersgd import PowerSGD
from lowrank_comm.lab.experiment import Progress
from lowrank_comm.lab.training.averaging import Crew
from lowrank_comm.numerics.randomness import stream


@dataclass(frozen=True)
class AveragedResidual(PowerSGD):
    """The control: PowerSGD whose workers keep Delta_i minus the applied mean."""

    json_name: ClassVar[str] = "powersgd with the averaged residual"

    def step(self, delta: Delta, state: State, context: Context) -> Steps:
        """Make one step; report the mean as what this worker sent."""
        result = yield from super().step(delta, state, context)
        return replace(result, sent=result.applied)


def averaged_residual(compressor: Compressor) -> Compressor:
    """Return the control of the same rank."""
    return AveragedResidual(rank=compressor.rank)


def measure(
    section: Mapping[str, Any],
    *,
    averaged: bool,
    gradients: Sequence[tuple[float, float]],
    workers: int,
    shape: tuple[int, int],
    checkpoints: Sequence[int],
    seeds: Sequence[int],
    progress: Progress,
) -> list[dict[str, Any]]:
    """Run to the last checkpoint, all kinds of gradients and seeds in one batch.

    Args:
        section: the compressor, as in a configuration file.
        averaged: use the control of the same rank and memory.
        gradients: (heterogeneity, noise) of each kind; see the top of this file.
        workers: N.
        shape: m, n.
        checkpoints: numbers of steps.
        seeds: of each kind of gradients.
        progress: called with the share that is done.

    Returns:
        For each kind of gradients, by checkpoint: "deviation" and "mean_error", root
        mean square of ||d_i|| over workers and seeds, and of ||e_bar|| over seeds;
        "lost", the mean over seeds of ||sum given - sum applied - e_bar|| / ||sum
        given||.
    """
    copies = [(kind, seed) for kind in range(len(gradients)) for seed in seeds]
    names = [f"X of seed {seed}, gradients {kind}" for kind, seed in copies]
    averager = Crew(workers).averager(
        section,
        dict.fromkeys(names, shape),
        torch.float32,
        wrap=averaged_residual if averaged else None,
    )
    assert averager.simulation is not None
    kinds = len(gradients)
    heterogeneity, noise = (
        torch.tensor(gradients, dtype=torch.float64)
        .repeat_interleave(len(seeds), dim=0)
        .T[..., None, None]
    )
    common = torch.stack([_common(seed, shape) for seed in seeds]).repeat(kinds, 1, 1)
    apart = torch.stack(
        [_drawn(seeds, f"heterogeneity of worker {i}", shape) for i in range(workers)]
    )
    apart = (apart - apart.mean(dim=0)).repeat(1, kinds, 1, 1)
    given = torch.zeros(len(copies), *shape).double()
    applied = torch.zeros(len(copies), *shape).double()
    found: list[dict[str, Any]] = [
        {"deviation": {}, "mean_error": {}, "lost": {}} for _ in gradients
    ]
    for t in range(max(checkpoints)):
        base = common / (1 + t / 100) ** 0.5
        drawn = [
            _drawn(seeds, f"noise of worker {i}", shape, t).repeat(kinds, 1, 1)
            for i in range(workers)
        ]
        each = [
            (base + heterogeneity * apart[i] + noise * drawn[i]).float() for i in range(workers)
        ]
        mean = averager.average([dict(zip(names, gradient, strict=True)) for gradient in each])
        given += torch.stack(each).double().mean(dim=0)
        applied += torch.stack([mean[name] for name in names]).double()
        if t % 100 == 0:
            progress(t / max(checkpoints), f"step {t} of {max(checkpoints)}")
        if t + 1 in checkpoints:
            memories = [averager.simulation.error_memory(i) for i in range(workers)]
            errors = torch.stack(
                [torch.stack([memory[name].double() for name in names]) for memory in memories]
            )
            middle = errors.mean(dim=0)
            lost = _norm(given - applied - middle) / _norm(given)
            apart_now = (errors - middle).square().sum(dim=(2, 3)).mean(dim=0)
            for kind in range(kinds):
                mine = slice(kind * len(seeds), (kind + 1) * len(seeds))
                found[kind]["deviation"][str(t + 1)] = float(apart_now[mine].mean().sqrt())
                found[kind]["mean_error"][str(t + 1)] = float(
                    _norm(middle[mine]).square().mean().sqrt()
                )
                found[kind]["lost"][str(t + 1)] = float(lost[mine].mean())
    return found


def _norm(matrices: Tensor) -> Tensor:
    return matrices.square().sum(dim=(1, 2)).sqrt()


def _drawn(seeds: Sequence[int], purpose: str, shape: tuple[int, int], t: int = -1) -> Tensor:
    return torch.stack(
        [
            torch.randn(shape, generator=stream(seed, "drift", t, purpose), dtype=torch.float64)
            for seed in seeds
        ]
    )


def _common(seed: int, shape: tuple[int, int]) -> Tensor:
    """Return a matrix with singular values 1/k."""
    u, _, vh = torch.linalg.svd(_drawn([seed], "common gradient", shape)[0], full_matrices=False)
    return (u / torch.arange(1, min(shape) + 1, dtype=torch.float64)) @ vh
