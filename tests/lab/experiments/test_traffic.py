"""The traffic of every method is its formula."""

from __future__ import annotations

import pytest

from lowrank_comm.compressors import REGISTRY
from lowrank_comm.lab.experiment import Case
from lowrank_comm.lab.experiments.traffic import Traffic
from lowrank_comm.lab.runner.preset import load
from lowrank_comm.lab.training.averaging import silent


@pytest.mark.parametrize(
    "case", Traffic().cases(load("traffic").settings), ids=lambda case: case.key
)
def test_measured_traffic_is_the_formula(case: Case) -> None:
    """Of every method in the preset, to the last element."""
    settings = load("traffic").settings
    result = Traffic().run(settings, case, silent)
    assert result["agrees"], (result["measured"], result["sent"])


def test_no_algorithm_is_forgotten() -> None:
    for name in ("traffic_small", "traffic_paper"):
        assert {method.section["compressor"] for method in load(name).settings.methods} == set(
            REGISTRY
        ), name


def test_a_wrong_formula_is_seen() -> None:
    settings = load("traffic").settings
    wrong = settings.methods[1].model_copy(update={"sent": "r * (m + n) + 1"})
    case = Case("x", {"method": wrong.name, "m": 64, "n": 48})
    assert not Traffic().run(settings.model_copy(update={"methods": [wrong]}), case, silent)[
        "agrees"
    ]
