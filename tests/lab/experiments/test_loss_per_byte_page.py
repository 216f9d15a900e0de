"""What the page of the language models says of its rows."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from lowrank_comm.lab.experiments.loss_per_byte import LossPerByteSettings
from lowrank_comm.lab.experiments.loss_per_byte_results import Final, Ratio
from tests.support.loss_per_byte_runs import EXPERIMENT, dense_tuning, row, settings_of, tuning

DENSE = {1: 5.0, 2: 5.1, 3: 4.9}


def behind(percent: float, *noise: float) -> dict[int, float | None]:
    """Losses so far behind dense, with noise by seed."""
    return {
        seed: loss + math.log1p(percent / 100) + extra
        for (seed, loss), extra in zip(DENSE.items(), noise or (0.0, 0.0, 0.0), strict=False)
    }


def rows_of(**methods: tuple[float, dict[int, float | None]]) -> list[dict[str, Any]]:
    """Final rows: method -> (bytes a step, losses); dense sends 40 kB."""
    return [
        row("final", method, seed, loss, sent=sent)
        for method, (sent, losses) in {"dense": (40_000.0, DENSE), **methods}.items()
        for seed, loss in losses.items()
    ]


@pytest.fixture
def settings(text_file: Path) -> LossPerByteSettings:
    def method(label: str, group: str, **more: Any) -> dict[str, Any]:
        return {"label": label, "group": group, "section": {"compressor": "powersgd"}} | more

    peer = {"label": "Peer", "peer": {"kind": "demo"}}
    methods = {
        "balanced": method("Balanced", "preset"),
        "powersgd": method("PowerSGD", "rival"),
        "peer": peer,
    }
    return settings_of(
        text_file, methods=methods, claims=[("balanced", "powersgd")], seeds=[1, 2, 3]
    )


def test_a_ratio_is_of_paired_differences_with_student_s_interval() -> None:
    found = Ratio.of({1: 5.1, 2: 5.2, 3: 9.0, 4: 5.3}, {1: 5.0, 2: 5.1, 4: 5.1})
    # differences .1, .1, .2: sd .0577, t = 4.303, n = 3
    assert found is not None
    assert found.n == 3
    assert found.value == pytest.approx(math.exp(0.4 / 3))
    assert found.high == pytest.approx(
        math.exp(0.4 / 3 + 4.30265 * 0.057735 / math.sqrt(3)), rel=1e-5
    )
    assert found.sign == 0
    assert "inside the interval" in found.evidence
    one = Ratio.of({1: 5.1}, {1: 5.0})
    assert one is not None
    assert one.sign is None
    assert "one seed" in one.evidence


def test_the_page_tells_what_the_rows_say(settings: LossPerByteSettings) -> None:
    rows = rows_of(
        balanced=(2000.0, behind(2, 0.001, -0.001, 0.0)),
        powersgd=(2500.0, behind(20, 0.01, 0.0, 0.0)),
        peer=(1000.0, behind(30)),
    )
    page = EXPERIMENT.page(settings, rows)
    line = next(line for line in page.splitlines() if line.startswith("| 1 | Balanced"))
    assert "| 2 kB | 20.0 | 1.020 | +2.0 % [+1.7, +2.3] | 3 | 0.004 | 1 |" in line
    assert "at 10 times fewer bytes or more: **reached**" in page
    assert "Balanced (2 kB) against PowerSGD (2.5 kB): -15.3 % [" in page
    assert "Balanced ends lower than PowerSGD (2 kB and 2.5 kB a step): holds" in page
    assert "Balanced: on the front." in page


def test_what_is_not_shown_is_called_so(settings: LossPerByteSettings) -> None:
    """Inside the interval, one seed, missed, beaten by a peer, not measured."""

    def page(*rows: dict[str, Any]) -> str:
        return EXPERIMENT.page(settings, list(rows))

    wide = page(*rows_of(balanced=(2000.0, behind(2, 0.05, -0.05, 0.0))))
    assert "undecided, 3 % is inside the interval" in wide
    assert "no such PowerSGD was run" in wide
    assert "Balanced ends lower than PowerSGD: not measured." in wide
    rows = rows_of(
        balanced=(2000.0, behind(9, 0.001, 0.0, 0.0)),
        powersgd=(2500.0, behind(10, 0.05, -0.05, 0.0)),
        peer=(1500.0, behind(5, 0.001, 0.0, 0.0)),
    )
    far = page(*rows)
    assert "**missed**. The lowest gap of 2 settings there is that of Balanced" in far
    assert "no setting has a mean gap of 3 % or less" in far
    assert "Balanced is **not on the front**: Peer sends 1.5 kB against 2 kB" in far
    assert "(2 kB and 2.5 kB a step): undecided" in far
    single = page(*(one for one in rows if one["params"]["seed"] == 1))
    assert "one seed, so no interval is known" in single
    assert "not seen on one seed" in single
    nothing = page()
    assert "not measured" in nothing
    # no division by what is not there, and a figure all the same
    assert set(EXPERIMENT.figures(settings, [])) == {"pareto"}


def test_a_diverged_run_has_no_ratio_and_is_told(settings: LossPerByteSettings) -> None:
    losses: dict[int, float | None] = behind(2) | {2: None}
    page = EXPERIMENT.page(settings, rows_of(balanced=(2000.0, losses)))
    assert "| 2 (1 diverged) |" in page


def test_the_front_is_of_those_that_send_less_and_end_lower(
    settings: LossPerByteSettings,
) -> None:
    rows = rows_of(
        balanced=(2000.0, behind(5)), powersgd=(2500.0, behind(6)), peer=(1000.0, behind(9))
    )
    final = Final(settings, rows, "adamw")
    beaten = {
        point.name: other and other.name
        for point in final.points
        for other in [final.beaten_by(point)]
    }
    assert beaten == {"dense": None, "balanced": None, "powersgd": "balanced", "peer": None}


def test_the_ruler_shows_all_tuning_and_what_lies_at_an_edge(
    settings: LossPerByteSettings,
) -> None:
    rows = dense_tuning({0.001: [4.0, 7.0], 0.004: [5.0, None]})
    page = EXPERIMENT.page(
        settings, [*rows, *tuning("balanced", {0.5: [4.0, 5.0], 1.0: [4.0, 6.0]})]
    )
    assert "| 0.001 | **5.500 ± 2.121** |" in page
    assert "| 0.004 | diverged |" in page
    assert "It lies at the edge of the grid" in page
    assert "| adamw | Balanced | ×0.5: **4.500 ± 0.707**; ×1: 5.000 ± 1.414 |" in page
    assert "Chosen at the edge of the grid: Balanced (adamw, ×0.5)." in page
