"""What the page of the fine-tuning says of its rows."""

from __future__ import annotations

from typing import Any

import pytest

from lowrank_comm.lab.experiments.fine_tuning_page import PAPER, PAPER_AVERAGE, column_mean
from tests.support.fine_tuning_runs import EXPERIMENT, contents, settings_of


def rows_of(scores: dict[tuple[str, str], list[float | None]]) -> list[dict[str, Any]]:
    return [
        {
            "key": f"{task}/{method}/seed{seed}",
            "params": {"task": task, "method": method, "seed": seed},
            "result": {
                "score": score, "metric": "accuracy", "scores": {"accuracy": score},
                "diverged": score is None, "held_out_examples": 32, "training_examples": 64,
                "parameters": 1_000_000, "steps": 3, "curve": [],
                "sent": {"ratio": 8.0, "uncompressed_bytes_per_step": 4e6},
            },
            "seconds": 1.0,
        }
        for (task, method), values in scores.items()
        for seed, score in enumerate(values, start=1)
    ]  # fmt: skip


def test_the_page_tells_what_the_rows_say(glue: str, encoder: str) -> None:
    methods = contents(glue, encoder)["settings"]["methods"]
    methods["powersgd"] = {"label": "PowerSGD", "section": {"compressor": "powersgd"}}
    plan = {"batch": 8, "steps": 3}
    settings = settings_of(
        glue, encoder, methods=methods, tasks={"sst2": plan, "rte": plan}, seeds=[1, 2, 3]
    )
    rows = rows_of({
        ("sst2", "full"): [90.0, 92.0, 91.0], ("rte", "full"): [80.0, 82.0, 81.0],
        ("sst2", "powersgd_plus"): [90.5, 91.0, 91.3], ("rte", "powersgd_plus"): [79.0, 83.0, 81.0],
        ("sst2", "powersgd"): [85.0, 87.2, 86.0], ("rte", "powersgd"): [75.0, 77.0, 76.1],
    })  # fmt: skip
    page = EXPERIMENT.page(settings, rows)
    assert (
        "| full precision | 91.00 ± 1.00 | 81.00 ± 1.00 | 86.00 ± 1.00 | 1.000 ± 0.000 | 1.000 |"
        " 8.0 |" in page
    )
    assert "PowerSGD+ > PowerSGD (paper: 86.28 > 85.73): holds" in page
    assert "full precision > PowerSGD+ (paper: 86.35 > 86.28): undecided, inside the spread" in page
    assert "| PowerSGD | -4.93 ± 0.29 | -4.97 ± 0.14 | -4.95 ± 0.12 |" in page
    worse = rows_of({("sst2", "full"): [90.0, None, 91.0]})
    assert "90.50 ± 0.71 (1 of 3 diverged)" in EXPERIMENT.page(settings, worse)
    turned = [
        row
        | {
            "params": row["params"]
            | {
                "method": {"powersgd": "powersgd_plus", "powersgd_plus": "powersgd"}.get(
                    row["params"]["method"], row["params"]["method"]
                )
            }
        }
        for row in rows
    ]
    assert "PowerSGD+ > PowerSGD (paper: 86.28 > 85.73): **contradicted**" in EXPERIMENT.page(
        settings, turned
    )


@pytest.mark.parametrize("behind", [0.0, 20.0])
def test_a_pair_that_is_level_in_the_paper_and_apart_here_is_a_contradiction(
    glue: str, encoder: str, behind: float
) -> None:
    methods = contents(glue, encoder)["settings"]["methods"]
    methods["powersgd"] = {"label": "PowerSGD", "section": {"compressor": "powersgd"}}
    methods["galore"] = {"label": "GaLore", "section": {"compressor": "galore"}}
    plan = {"batch": 8, "steps": 3, "restart_every": 8}
    settings = settings_of(glue, encoder, methods=methods, tasks={"sst2": plan}, seeds=[1, 2, 3])
    rows = rows_of({
        ("sst2", "powersgd"): [85.0, 87.2, 86.0],
        ("sst2", "galore"): [85.1 - behind, 87.0 - behind, 86.0 - behind],
    })  # fmt: skip
    page = EXPERIMENT.page(settings, rows)
    claim = "GaLore level with PowerSGD (paper: 85.70 and 85.73): "
    told = "**GaLore here contradicts Table 1.** There it is 0.03 points from PowerSGD, here 20.03"
    if behind:
        assert claim + "**a difference is seen**: left is smaller" in page
        assert f"{told} points behind. The runs here are of 3 steps with tau = 8;" in page
    else:
        assert claim + "no difference seen, as claimed" in page
        assert "contradicts" not in page


def test_the_papers_printed_averages_are_near_the_means_of_its_columns() -> None:
    assert PAPER_AVERAGE.keys() == PAPER.keys()
    for method, average in PAPER_AVERAGE.items():
        assert len(PAPER[method]) == 8
        assert column_mean(method) == pytest.approx(average, abs=0.08)
