"""M4: its bound, its speed-up, and what it is without noise."""

from __future__ import annotations

import math

import numpy as np
import torch

from lowrank_comm.bidirectional import M3, M4, BidirectionalSimulation, Problem
from lowrank_comm.numerics.randomness import stream
from tests.support.bidirectional_runs import mean_squared_gradient, run


def test_sigma_0_and_a_1_make_m4_marina_with_marina_p() -> None:
    """Then M4 is M3 with beta = 1: two definitions, one trajectory."""
    m4 = M4(4, 0.3, uplink_fraction=0.4, gradient_weight=1.0)
    m3 = M3(4, 0.3, uplink_fraction=0.4, model_weight=1.0)
    torch.testing.assert_close(run(m4, 40).x, run(m3, 40).x, rtol=1e-12, atol=1e-12)


def test_m4s_bound_holds_in_runs_with_heterogeneous_data() -> None:
    method, n, batch, steps = M4(4, uplink_fraction=0.25, gradient_weight=0.05), 16, 4, 1000
    first = math.ceil(batch / 0.05)
    gap = mean_squared_gradient(method, n, 0.1, 1, batch, first)[1].gap
    problem = Problem(1.008, gap, 4.0, structure=0.0)
    measured, _ = mean_squared_gradient(
        method, n, method.step_size(problem, n, 64), steps, batch, first, tilt=0.3
    )
    assert 0 < measured <= method.bound(problem, n, 64, batch, first, steps) < 3


def test_m4_speeds_up_linearly_in_n_times_b() -> None:
    """With a and gamma growing as sqrt(nB) both terms of the bound fall as 1/sqrt(nB):
    log-log slope -0.5 +- 0.08.
    """
    d, steps, points = 32, 1500, []
    for n, batch in ((2, 1), (4, 2), (8, 4), (32, 4)):
        a = 0.015 * math.sqrt(n * batch)
        method, means = M4(2, uplink_fraction=0.5, gradient_weight=a), []
        for seed in range(2):
            x = torch.full((d,), 0.3, dtype=torch.float64)
            simulation, total = BidirectionalSimulation(method, x, n, gamma=0.5 * a, seed=seed), 0.0
            noise = stream(seed, "test", 0, "sgd noise")
            tilts = torch.linspace(-1, 1, n, dtype=torch.float64)[:, None]
            for t in range(steps):
                # f = ||x||^2/2
                total += float(simulation.x.square().sum())
                scale = 2.0 / math.sqrt(d * (math.ceil(batch / a) if t == 0 else batch))
                drawn = torch.randn(n, d, generator=noise, dtype=torch.float64)
                assert simulation.step(simulation.points + tilts + scale * drawn)
            means.append(total / steps)
        points.append((math.log(n * batch), math.log(sum(means) / len(means))))
    x, y = np.array(points).T
    assert abs(np.polyfit(x, y, 1)[0] + 0.5) < 0.08, points
