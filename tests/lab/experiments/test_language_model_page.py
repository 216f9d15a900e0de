"""What the page of the language models says of its rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lowrank_comm.lab.experiments.language_model import LanguageModelSettings
from lowrank_comm.lab.experiments.language_model_results import PAPER
from tests.support.language_model_runs import EXPERIMENT, contents, settings_of, tuned


def rows_of(perplexities: dict[tuple[str, int | None], list[float | None]]) -> list[dict[str, Any]]:
    """Final rows on seeds 1, 2, ...; None for a run that diverged."""
    return [
        {
            "key": f"final/{method}/{rank}/{seed}",
            "params": {
                "part": "final",
                "method": method,
                "rank": rank,
                "seed": seed,
                "learning_rate": 0.004,
            },
            "result": {
                "perplexity": value,
                "loss": None,
                "diverged": value is None,
                "parameters": 1_000_000,
                "steps": 4,
                "curve": [[1, 5.0]],
                "sent": {"bytes": {}, "bytes_per_step": 2000.0, "ratio": 20.0},
            },
            "seconds": 1.0,
        }
        for (method, rank), values in perplexities.items()
        for seed, value in enumerate(values, start=1)
    ]


@pytest.fixture
def four(text_file: Path) -> LanguageModelSettings:
    """Full precision, PowerSGD, PowerSGD+ and GaLore at the paper's ranks."""
    methods = contents(text_file)["settings"]["methods"]
    methods["powersgd_plus"] = {"label": "PowerSGD+", "section": {"compressor": "powersgd_plus"}}
    methods["galore"] = {"label": "GaLore", "section": {"compressor": "galore"}}
    return settings_of(text_file, methods=methods, ranks=[4, 8], seeds=[1, 2, 3])


def test_the_page_tells_what_the_rows_say(four: LanguageModelSettings) -> None:
    rows = rows_of({
        ("adam", None): [100.0, 110.0, 105.0],
        # 1.2 times full precision on every seed
        ("powersgd", 4): [120.0, 132.0, 126.0],
        # now above PowerSGD, now below
        ("powersgd_plus", 4): [121.0, 131.0, 126.2],
        ("galore", 4): [None, 400.0, 410.0],
        ("powersgd", 8): [110.0, 121.1, 115.5],
    })  # fmt: skip
    page = EXPERIMENT.page(four, rows)
    line = next(line for line in page.splitlines() if line.startswith("| PowerSGD |"))
    assert "| 126.00 ± 6.00 | 1.200 ± 0.000 | 1.209 | - | 2 kB | 20.0 |" in line
    plus = next(line for line in page.splitlines() if line.startswith("| PowerSGD+ |"))
    assert "inside the spread" in plus
    assert f"{PAPER['60M']['powersgd_plus'][4] / PAPER['60M']['adam'][None]:.3f}" in plus
    assert "(1 of 3 diverged)" in page
    assert "rank 4, full precision < PowerSGD (paper: 29.88 < 36.11): holds" in page
    assert (
        "rank 4, PowerSGD+ < PowerSGD (paper: 35.46 < 36.11): undecided, inside the spread" in page
    )
    assert "rank 8, PowerSGD+ > PowerSGD (paper: 32.63 > 32.57): not measured." in page
    assert "rank 4, PowerSGD < GaLore (paper: 36.11 < 94.96): holds" in page
    assert "PowerSGD: rank 8 < rank 4: holds" in page


def test_the_page_says_where_the_paper_is_contradicted(four: LanguageModelSettings) -> None:
    rows = rows_of(
        {("powersgd", 4): [120.0, 130.0, 125.0], ("powersgd_plus", 4): [124.0, 134.1, 129.2]}
    )
    assert (
        "PowerSGD+ < PowerSGD (paper: 35.46 < 36.11): **contradicted** (left minus right +4.10"
        in EXPERIMENT.page(four, rows)
    )


def test_a_learning_rate_at_the_edge_of_the_grid_is_told(four: LanguageModelSettings) -> None:
    rows = tuned("powersgd", {0.001: 50.0, 0.004: 40.0})
    for row in rows:
        row["params"] |= {"rank": 4, "seed": 0}
        row["result"] |= {"parameters": 1, "diverged": False}
    page = EXPERIMENT.page(four, rows)
    assert "| PowerSGD | 50.00 | **40.00** |" in page
    assert "at the edge of the grid, so perhaps not the best there is: PowerSGD (0.004)" in page
