"""The scaling experiment: clock and target by hand, the search, and a small run from
cases to page.
"""

from __future__ import annotations

import json

from lowrank_comm.lab.experiments.scaling import CONTENDERS, Scaling, ScalingSettings
from lowrank_comm.lab.experiments.scaling_page import OF_PROBLEM, SYNCHRONOUS

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
