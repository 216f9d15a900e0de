"""Inkheart SGD: its bound and its plan."""

from __future__ import annotations

import math

import pytest

from lowrank_comm.bidirectional import InkheartSGD, Problem
from lowrank_comm.bidirectional import inkheart as inkheart_module
from tests.support.bidirectional_runs import mean_squared_gradient


@pytest.mark.parametrize(("n", "compression", "groups", "batch"), [(16, 4, 4, 4), (64, 16, 16, 4)])
def test_inkhearts_bound_holds_in_runs(n: int, compression: int, groups: int, batch: int) -> None:
    method, steps = InkheartSGD(groups, uplink_fraction=1 / compression), 1000
    gap = mean_squared_gradient(method, n, 0.1, 1, batch, batch)[1].gap
    problem = Problem(1.008, gap, 4.0, structure=0.0)
    gamma = method.step_size(problem, n, 64, batch, steps)
    measured, _ = mean_squared_gradient(method, n, gamma, steps, batch, batch)
    assert 0 < measured <= method.bound(problem, n, 64, batch, steps, gamma) < 3


@pytest.mark.parametrize("kappa", [0.01, 1.5])
@pytest.mark.parametrize("structure", [None, 0.3, 0.0])
def test_inkhearts_plan_takes_the_divisor_of_n_with_the_fewest_seconds(
    structure: float | None, kappa: float
) -> None:
    """A large L_A bounds gamma so much that the largest G is the worst."""
    problem = Problem(1.0, gap=1.0, variance=4.0, structure=structure)
    n = 64
    d = 128
    eps = 0.01
    seconds = {}
    chosen = inkheart_module.plan(problem, n, d, h=1.0, kappa=kappa, eps=eps)
    for groups in (1, 2, 4, 8, 16, 32, 64):
        method = InkheartSGD(groups, uplink_fraction=chosen.method.uplink_fraction)
        noise = 6 * (method.uplink.omega(d) + 1) * problem.variance / (n * chosen.batch)
        gamma = min(method.largest_step_size(problem, n, d), eps / (2 * noise))
        steps = math.ceil(4 * problem.gap / (gamma * (eps - gamma * noise)))
        down = d if groups == 1 else d / groups + (1 - 1 / groups) * d / groups
        seconds[groups] = steps * (
            chosen.batch + kappa * (chosen.method.uplink_fraction * d + down)
        )
    assert chosen.seconds == pytest.approx(min(seconds.values()), rel=1e-9)
    assert chosen.seconds == pytest.approx(seconds[chosen.method.downlink_groups], rel=1e-9)
    if structure is None:
        assert chosen.method.downlink_groups < 8 and seconds[64] > 10 * chosen.seconds
