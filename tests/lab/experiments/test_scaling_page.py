"""What the page of the scaling experiment concludes from its rows."""

from __future__ import annotations

from typing import Any

from lowrank_comm.lab.experiments import scaling_page
from lowrank_comm.lab.experiments.scaling import CONTENDERS, Scaling, ScalingSettings
from lowrank_comm.lab.experiments.scaling_page import EXPECTED, PLATEAU, claims, ends
from lowrank_comm.lab.runner import pages
from lowrank_comm.lab.runner.preset import load
from tests.support import ROOT


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
