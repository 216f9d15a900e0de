"""The scaling experiment: clock and target by hand, the search, and a small run from
cases to page.
"""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from tests.support import ROOT

pytest.importorskip("matplotlib")

from lowrank_comm.bidirectional import MarinaP
from lowrank_comm.lab.experiments import scaling_page
from lowrank_comm.lab.experiments.scaling import CONTENDERS, Scaling, ScalingSettings
from lowrank_comm.lab.experiments.scaling_page import (
    EXPECTED,
    OF_PROBLEM,
    PLATEAU,
    SYNCHRONOUS,
    claims,
    ends,
)
from lowrank_comm.lab.problems.simulated_clock import (
    Choice,
    Objective,
    descend_on_grid,
    seconds_to_target,
)
from lowrank_comm.lab.runner import pages
from lowrank_comm.lab.runner.preset import load

SETTINGS = ScalingSettings(
    problems=("quadratic", "heterogeneous"),
    workers=(1, 4),
    d=16,
    eps=0.05,
    variance=1.0,
    seeds=(0, 1),
    trials=6,
    limit=2e4,
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


def test_a_small_run_from_cases_to_page() -> None:
    experiment = Scaling()
    cases = experiment.cases(SETTINGS)
    assert [case.key for case in cases] == [
        f"{p}/{m}/{n}" for p in SETTINGS.problems for m in OF_PROBLEM[p] for n in (1, 4)
    ]
    rows = []
    for case in cases:
        shares: list[float] = []
        result = experiment.run(
            SETTINGS, case, lambda share, text, shares=shares: shares.append(share)
        )
        assert shares and all(0 <= share <= 1 for share in shares)
        result = json.loads(json.dumps(result).replace("Infinity", "null"))
        rows.append({"key": case.key, "params": case.params, "result": result, "seconds": 1.0})
    found = {row["key"]: row["result"]["seconds"] for row in rows}
    assert found["quadratic/inkheart/4"] != found["quadratic/sync/4"]
    assert (
        None not in found["quadratic/sync/4"]
        and found["quadratic/sync/4"] < found["quadratic/sync/1"]
    )
    for row in rows:
        result = row["result"]
        assert set(result["chosen"]) == set(CONTENDERS[row["params"]["method"]].tuned)
        assert result["trials"] <= SETTINGS.trials and result["capped"] == (
            result["trials"] == SETTINGS.trials
        )
        assert ("floor" in result) == (row["params"]["method"] in SYNCHRONOUS)
        # no noise, and B = 1
        assert result.get("floor", 0.0) < min(result["seconds"])
    page = experiment.page(SETTINGS, rows)
    figures = experiment.figures(SETTINGS, rows)
    assert set(figures) == set(SETTINGS.problems) and all(
        f"]({stem}.png)" in page for stem in figures
    )
    mean = sum(found["quadratic/sync/4"]) / 2 / 1e3
    assert f"{mean:.1f}k" in page and "reconstruction" in page
    line = next(
        line
        for line in page.splitlines()
        if line.startswith("- Searches that the cap of 6 choices ended:")
    )
    assert (
        {row["key"] for row in rows if row["result"]["capped"]}
        == set(line.split("`")[1::2])
        != set()
    )


def _row(
    method: str,
    n: int,
    seconds: list[float | None],
    chosen: dict[str, Any],
    floor: float | None = None,
) -> dict[str, Any]:
    result = {
        "seconds": seconds,
        "chosen": chosen,
        "smoothness": 1.008,
        "capped": False,
        "floor": floor,
    }
    params = {"problem": "quadratic", "method": method, "n": n}
    return {"key": f"quadratic/{method}/{n}", "params": params, "result": result, "seconds": 1}


def test_expected_ratios_are_judged_from_the_rows() -> None:
    settings = ScalingSettings(problems=("quadratic",), kappa=10.0)
    rows = [_row("sync", 16, [10.0], {"B": 320}, 8.0), _row("sync", 64, [9.5], {"B": 320}, 8.0)]
    rows += [_row("inkheart", 16, [8.0], {}), _row("inkheart", 64, [7.0], {})]
    rows += [_row("control", 4, [5.0], {}), _row("control", 64, [None], {})]
    page = Scaling().page(settings, rows)
    assert (
        "| > 0.9 | 0.950 | yes |" in page
        and "| < 0.8 | 0.875 | **no** |" in page
        and "not reached | yes" in page
    )
    assert (
        "- Quadratic, homogeneous data: Inkheart SGD keeps falling: 0.875, expected < 0.8" in page
    )
    assert "1.25 times" in page and "2 kappa d is 8.0 h B: limited" in page
    assert "7.9 h B: **not** limited" in Scaling().page(
        settings.model_copy(update={"kappa": 9.9}), rows
    )
    assert {
        method for _, _, above, below, _, _ in EXPECTED for method in (above[0], below[0])
    } == set(CONTENDERS)


def test_choices_at_an_end_of_their_grid_are_found() -> None:
    """Without momentum the last step size below 2/L is an end; K = d, G = n, B = 1 and
    a = 1 are the parameter's own.
    """
    settings = ScalingSettings(
        batches=(1, 2, 4),
        gammas=(0.5, 1.9, 4.0),
        fractions=(0.25, 0.5, 1.0),
        weights=(0.1, 0.5, 1.0),
    )

    def at(method: str, n: int, **chosen: float) -> dict[str, bool]:
        return ends(
            settings,
            _row(
                method,
                n,
                [1.0],
                {key.replace("gL", "gamma L"): value for key, value in chosen.items()},
            ),
        )

    assert at("sync", 16, B=4, gL=1.9) == {"B 4": False, "gamma L 1.9": False}
    assert at("sync_momentum", 16, B=2, gL=1.9, a=0.5) == {}
    assert at("m4", 16, B=1, gL=4.0, a=1.0, G=16) == {
        "B 1": True,
        "gamma L 4": False,
        "a 1": True,
        "G 16": True,
    }
    limited = settings.model_copy(update={"groups": (1, 2, 4, 8)})
    assert ends(limited, _row("inkheart", 16, [1.0], {"K/d": 0.25, "G": 8})) == {
        "K/d 0.25": False,
        "G 8": False,
    }
    page = Scaling().page(
        ScalingSettings(batches=(1, 2)), [_row("sync", 16, [1.0], {"B": 2, "gamma L": 1.0})]
    )
    assert "`quadratic/sync/16` (B 2)" in page


RESULTS = ROOT / "docs" / "results"
CONTRADICTED = {
    ("quadratic", "Inkheart SGD keeps falling"),
    ("non_convex", "Inkheart SGD keeps falling"),
    ("heterogeneous", "and further"),
}
"""(problem, claim) of EXPECTED that the published rows contradict; the page names each.
Nothing else may fail.
"""


def test_the_published_rows_keep_what_was_expected_but_for_the_known_contradictions() -> None:
    published = pages.read_published(RESULTS / "scaling.jsonl")
    settings, found = published.preset.settings, []
    assert isinstance(settings, ScalingSettings)
    for problem in settings.problems:
        found += claims(problem, published.rows)
    assert {(c.problem, c.claim) for c in found} == {
        (p, claim) for problems, claim, *_ in EXPECTED for p in problems
    }
    assert {(c.problem, c.claim) for c in found if not c.holds} == CONTRADICTED
    page = (RESULTS / "scaling.md").read_text(encoding="utf-8")
    for problem, claim in CONTRADICTED:
        assert f"- {scaling_page.TITLES[problem]}: {claim}: " in page


def test_the_published_kappa_meets_its_criterion_and_every_edge_is_named() -> None:
    published = pages.read_published(RESULTS / "scaling.jsonl")
    settings, rows = published.preset.settings, {row["key"]: row for row in published.rows}
    assert isinstance(settings, ScalingSettings) and settings == load("scaling", "small").settings
    n, least = PLATEAU
    for key in (f"quadratic/sync/{n}", f"non_convex/sync/{n}", f"heterogeneous/sync_momentum/{n}"):
        assert (
            2 * settings.kappa * settings.d
            >= least * settings.h * rows[key]["result"]["chosen"]["B"]
        )
    page = (RESULTS / "scaling.md").read_text(encoding="utf-8")
    for key, row in rows.items():
        for name in ends(settings, row):
            assert any(f"`{key}`" in line and name in line for line in page.splitlines())
        assert not row["result"]["capped"] or f"`{key}`" in page
