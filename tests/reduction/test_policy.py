"""Rules that override settings by a parameter's name."""

from __future__ import annotations

import pytest
import torch

from lowrank_comm import ConfigError, PowerSGD
from lowrank_comm.reduction.policy import Rule
from lowrank_comm.simulation import Simulation
from tests.support.matrices import drawn


def test_rules_override_by_name_and_the_first_match_wins() -> None:
    shapes = {
        "embed.weight": (60, 20),
        "a.weight": (60, 20),
        "b.weight": (60, 20),
        "tiny.weight": (6, 4),
    }
    rules = [
        Rule("embed.*", treatment="dense"),
        Rule("a.*", rank=2),
        Rule("tiny.*", treatment="low_rank"),
        Rule("*", rank=7),
    ]
    sim = Simulation(shapes, PowerSGD(4), 1, dtype=torch.float64, rules=rules)
    ranks = {row.name: row.rank for row in sim.reducers[0].plan.rows}
    assert ranks == {"embed.weight": 0, "a.weight": 2, "b.weight": 7, "tiny.weight": 4}
    sim.reduce([drawn(0, 0, shapes)])
    assert set(sim.error_memory(0)) == {"a.weight", "b.weight", "tiny.weight"}
    assert sim.last_reports[0].bytes["factors"] == 8 * (2 * 80 + 7 * 80 + 4 * 10)
    assert sim.last_reports[0].bytes["dense"] == 8 * 60 * 20


def test_a_last_rule_that_says_nothing_is_refused() -> None:
    """Before others it excepts its parameters from them."""
    shapes = {"head.weight": (60, 20), "a.weight": (60, 20)}
    rules = [Rule("head.*"), Rule("*", treatment="dense")]
    sim = Simulation(shapes, PowerSGD(4), 1, rules=rules)
    assert {row.name: row.scheme for row in sim.reducers[0].plan.rows} == {
        "head.weight": "low_rank",
        "a.weight": "dense",
    }
    with pytest.raises(ConfigError, match=r"rules\[match='head\.\*'\] has no effect.*treatment"):
        Simulation(shapes, PowerSGD(4), 1, rules=[rules[1], rules[0]])
