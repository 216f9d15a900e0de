"""The scaling experiment: clock and target by hand, the search, and a small run from cases to page."""

from __future__ import annotations

import json
import math

import pytest
import torch

pytest.importorskip("matplotlib")

from lowrank_comm.bidirectional import MarinaP
from lowrank_comm.lab.experiments.scaling import EXPECTED, OF_PROBLEM, Scaling, ScalingSettings
from lowrank_comm.lab.simulated_clock import Choice, Objective, descend_on_grid, seconds_to_target

SETTINGS = ScalingSettings(
    problems=("quadratic", "heterogeneous"), workers=(1, 4), d=16, eps=0.05, variance=1.0, seeds=(0, 1), trials=6, limit=2e4
)


@pytest.mark.parametrize("non_convex", [False, True])
def test_the_gradient_is_that_of_the_objective(non_convex: bool) -> None:
    objective = Objective(6, 1.0, non_convex)
    b, w = objective.b(), torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    a = 0.508 * torch.eye(6, dtype=torch.float64)
    a -= 0.25 * (torch.diag(torch.ones(5), 1) + torch.diag(torch.ones(5), -1))
    w.requires_grad_()
    f = 0.5 * (w @ a * w).sum() - (w @ b).sum()
    if non_convex:
        f = f - 0.15 * (2 / (1 + w**2) + (1 + w**2).log()).sum()
    (expected,) = torch.autograd.grad(f, w)
    torch.testing.assert_close(objective.gradient(w.detach(), b), expected)
    assert float(Objective(6, 1.0, tilt=0.5).tilts(5).sum(dim=0).abs().max()) < 1e-12


def test_seconds_of_synchronous_sgd_without_noise_are_the_formula() -> None:
    keywords = {"batch": 3, "first_batch": 3, "gamma": 1.0, "h": 2.0, "kappa": 0.5, "eps": 1e-3, "window": 5, "seed": 0}
    trial = seconds_to_target(Objective(16, 0.0), MarinaP(1), 4, limit=1e9, most_steps=5000, **keywords)  # type: ignore[arg-type]
    assert 5 < trial.steps < 5000 and trial.residual <= 1e-3
    assert trial.seconds == pytest.approx(trial.steps * (2.0 * 3 + 0.5 * 32))
    stopped = seconds_to_target(Objective(16, 0.0), MarinaP(1), 4, limit=1e9, most_steps=6, **keywords)  # type: ignore[arg-type]
    assert math.isinf(stopped.seconds) and stopped.steps == 6 and stopped.residual > 1e-3


def test_the_search_moves_two_parameters_where_no_single_one_helps() -> None:
    """A valley along the diagonal, whose floor falls: single steps only climb."""

    def cost(choice: Choice, best: float) -> float:
        return 10 * abs(choice["x"] - choice["y"]) - choice["x"]

    grid = {"x": range(6), "y": range(6)}
    chosen, value, evaluations = descend_on_grid(grid, {"x": 1, "y": 1}, cost, 100)
    assert (chosen, value) == ({"x": 5, "y": 5}, -5) and evaluations <= 100
    assert descend_on_grid(grid, {"x": 1, "y": 1}, cost, 4)[2] <= 4


def test_a_small_run_from_cases_to_page() -> None:
    experiment = Scaling()
    cases = experiment.cases(SETTINGS)
    assert [case.key for case in cases] == [f"{p}/{m}/{n}" for p in SETTINGS.problems for m in OF_PROBLEM[p] for n in (1, 4)]
    rows = []
    for case in cases:
        shares: list[float] = []
        result = experiment.run(SETTINGS, case, lambda share, text, shares=shares: shares.append(share))
        assert shares and all(0 <= share <= 1 for share in shares)
        result = json.loads(json.dumps(result).replace("Infinity", "null"))
        rows.append({"key": case.key, "params": case.params, "result": result, "seconds": 1.0})
    found = {row["key"]: row["result"]["seconds"] for row in rows}
    assert found["quadratic/inkheart/4"] != found["quadratic/sync/4"]
    assert None not in found["quadratic/sync/4"] and found["quadratic/sync/4"] < found["quadratic/sync/1"]
    page = experiment.page(SETTINGS, rows)
    figures = experiment.figures(SETTINGS, rows)
    assert set(figures) == set(SETTINGS.problems) and all(f"]({stem}.png)" in page for stem in figures)
    mean = sum(found["quadratic/sync/4"]) / 2 / 1e3
    assert f"{mean:.1f}k" in page and "reconstruction" in page


def test_expected_ratios_are_judged_from_the_rows() -> None:
    def row(method: str, n: int, seconds: list[float | None]) -> dict[str, object]:
        params = {"problem": "quadratic", "method": method, "n": n}
        return {
            "key": f"quadratic/{method}/{n}",
            "params": params,
            "result": {"seconds": seconds, "chosen": {}},
            "seconds": 1,
        }

    settings = ScalingSettings(problems=("quadratic",))
    rows = [row("sync", 16, [10.0]), row("sync", 64, [9.5]), row("inkheart", 16, [8.0]), row("inkheart", 64, [7.0])]
    rows += [row("control", 4, [5.0]), row("control", 64, [None])]
    page = Scaling().page(settings, rows)
    assert "| > 0.9 | 0.950 | yes |" in page and "| < 0.8 | 0.875 | **no** |" in page and "not reached | yes" in page
    assert {method for _, _, above, below, _, _ in EXPECTED for method in (above[0], below[0])} <= {
        "sync", "inkheart", "control", "m4", "sync_momentum"
    }  # fmt: skip
