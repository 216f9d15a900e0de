"""Runs of methods with a server on quadratics."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lowrank_comm.bidirectional import BidirectionalSimulation, Method, Problem
from lowrank_comm.numerics.randomness import stream

D, N = 11, 4


def pull(points: Tensor, t: int) -> Tensor:
    """Gradients of 0.5 ||w - target_i||^2 with noise of worker and step, a function of
    (points, t).
    """
    noise = torch.randn(points.shape, generator=stream(0, "test", t, "noise"), dtype=torch.float64)
    targets = torch.arange(points.shape[0], dtype=torch.float64)[:, None] + 1
    return points - targets + 0.3 * noise


def run(
    method: Method, steps: int, n: int = N, gamma: float = 0.2, seed: int = 3
) -> BidirectionalSimulation:
    simulation = BidirectionalSimulation(
        method, torch.zeros(D, dtype=torch.float64), n, gamma=gamma, seed=seed
    )
    for t in range(steps):
        assert simulation.step(pull(simulation.points, t))
    return simulation


def laplacian(d: int) -> Tensor:
    return (
        0.508 * torch.eye(d)
        - 0.25 * torch.diag(torch.ones(d - 1), 1)
        - 0.25 * torch.diag(torch.ones(d - 1), -1)
    )


def mean_squared_gradient(
    method: Method,
    n: int,
    gamma: float,
    steps: int,
    batch: int,
    first_batch: int,
    tilt: float = 0.0,
    seed: int = 0,
) -> tuple[float, Problem]:
    """Mean over t < T of ||grad f(x_t)||^2 on a quadratic with noise, sigma^2 = 4."""
    d = 64
    a = laplacian(d).double()
    b = 0.15 * torch.randn(d, generator=stream(0, "test", 0, "b"), dtype=torch.float64)
    tilts = tilt * torch.randn(n, d, generator=stream(0, "test", 0, "tilts"), dtype=torch.float64)
    tilts -= tilts.mean(dim=0)
    simulation = BidirectionalSimulation(
        method, torch.zeros(d, dtype=torch.float64), n, gamma=gamma, seed=seed
    )
    noise, total = stream(seed, "test", 0, "sgd noise"), 0.0
    for t in range(steps):
        total += float((a @ simulation.x - b).square().sum())
        scale = 2.0 / math.sqrt(d * (first_batch if t == 0 else batch))
        w = simulation.points
        assert simulation.step(
            w @ a - b + tilts + scale * torch.randn(n, d, generator=noise, dtype=torch.float64)
        )
    gap = 0.5 * float(b @ torch.linalg.solve(a, b))
    return total / steps, Problem(1.008, gap, 4.0, structure=0.0)
