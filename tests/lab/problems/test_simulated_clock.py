"""Seconds of the simulated clock, the objective, and the search for parameters."""

from __future__ import annotations

import math

import pytest
import torch

from lowrank_comm.bidirectional import MarinaP
from lowrank_comm.lab.problems.simulated_clock import (
    Choice,
    Objective,
    descend_on_grid,
    seconds_to_target,
)


@pytest.mark.parametrize("non_convex", [False, True])
def test_the_gradient_is_that_of_the_objective(non_convex: bool) -> None:
    objective = Objective(6, 1.0, non_convex)
    b = objective.b()
    w = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a = 0.508 * torch.eye(6, dtype=torch.float64)
    a -= 0.25 * (torch.diag(torch.ones(5), 1) + torch.diag(torch.ones(5), -1))
    w.requires_grad_()
    f = 0.5 * (w @ a * w).sum() - (w @ b).sum()
    if non_convex:
        f = f - 0.15 * (2 / (1 + w**2) + (1 + w**2).log()).sum()
    (expected,) = torch.autograd.grad(f, w)
    torch.testing.assert_close(objective.gradient(w.detach(), b), expected)
    assert float(Objective(6, 1.0, tilt=0.5).tilts(5).sum(dim=0).abs().max()) < 1e-12


@pytest.mark.parametrize(("non_convex", "rounded"), [(False, 1.008), (True, 1.308)])
def test_the_smoothness_is_the_largest_eigenvalue_of_any_hessian(
    non_convex: bool, rounded: float
) -> None:
    """Reached at 0, and passed nowhere; the control: where w = 1, the Hessian of the
    non-convex problem is another.
    """
    objective, d = Objective(128, 1.0, non_convex), 128
    b, generator = objective.b(), torch.Generator().manual_seed(0)

    def largest(w: torch.Tensor) -> float:
        step = 1e-5 * torch.eye(d, dtype=torch.float64)
        hessian = (objective.gradient(w + step, b) - objective.gradient(w - step, b)) / 2e-5
        return float(torch.linalg.eigvalsh((hessian + hessian.T) / 2)[-1])

    assert objective.smoothness == pytest.approx(rounded, abs=5e-4)
    assert largest(torch.zeros(d, dtype=torch.float64)) == pytest.approx(
        objective.smoothness, abs=1e-6
    )
    for scale in (0.1, 0.5, 1.0, 3.0):
        points = scale * torch.randn(d, generator=generator, dtype=torch.float64)
        assert largest(points) <= objective.smoothness + 1e-6
    assert (largest(torch.ones(d, dtype=torch.float64)) < objective.smoothness - 0.1) == non_convex


def test_seconds_of_synchronous_sgd_without_noise_are_the_formula() -> None:
    keywords = {
        "batch": 3,
        "first_batch": 3,
        "gamma": 1.0,
        "h": 2.0,
        "kappa": 0.5,
        "eps": 1e-3,
        "window": 5,
        "seed": 0,
    }
    trial = seconds_to_target(
        Objective(16, 0.0), MarinaP(1), 4, limit=1e9, most_steps=5000, **keywords
    )  # type: ignore[arg-type]
    assert 5 < trial.steps < 5000 and trial.residual <= 1e-3
    assert trial.seconds == pytest.approx(trial.steps * (2.0 * 3 + 0.5 * 32))
    stopped = seconds_to_target(
        Objective(16, 0.0), MarinaP(1), 4, limit=1e9, most_steps=6, **keywords
    )  # type: ignore[arg-type]
    assert math.isinf(stopped.seconds) and stopped.steps == 6 and stopped.residual > 1e-3


def test_the_search_moves_two_parameters_where_no_single_one_helps() -> None:
    """A valley along the diagonal, whose floor falls: single steps only climb."""

    def cost(choice: Choice, best: float) -> float:
        return 10 * abs(choice["x"] - choice["y"]) - choice["x"]

    grid = {"x": range(6), "y": range(6)}
    found = descend_on_grid(grid, {"x": 1, "y": 1}, cost, 100)
    assert (
        (found.chosen, found.cost) == ({"x": 5, "y": 5}, -5)
        and found.trials <= 100
        and not found.capped
    )
    stopped = descend_on_grid(grid, {"x": 1, "y": 1}, cost, 4)
    assert stopped.trials == 4 and stopped.capped and stopped.cost > -5
