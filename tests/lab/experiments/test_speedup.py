"""The linear speed-up: its slope, its control, and gloo processes against the
simulation.
"""

from __future__ import annotations

from typing import Any

import pytest

from lowrank_comm import ConfigError
from lowrank_comm.lab.experiment import Case
from lowrank_comm.lab.experiments.speedup import Speedup, SpeedupSettings, _slope
from lowrank_comm.lab.experiments.traffic import Traffic
from lowrank_comm.lab.runner.preset import load
from lowrank_comm.lab.training.averaging import Crew, silent

POWERSGD_PLUS = {"compressor": "powersgd_plus", "rank": 2, "restart_every": 5}


def speedup(
    method: str, workers: int, backend: str = "simulation", **changes: Any
) -> dict[str, float]:
    content = {
        "workers": [1, 4],
        "steps": 120,
        "rate": 0.05,
        "condition": 2.0,
        "seeds": [0, 1, 2, 3],
        "backend": backend,
        "methods": [
            {"name": "SGD", "section": {"compressor": "identity"}},
            {"name": "control", "section": {"compressor": "identity"}, "shared_noise": True},
            {"name": "PowerSGD+", "section": POWERSGD_PLUS},
        ],
    }
    settings = SpeedupSettings.model_validate(content | changes)
    case = Case("x", {"method": method, "workers": workers})
    return Speedup().run(settings, case, silent)["mean_squared_gradient"]  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", ["SGD", "PowerSGD+"])
def test_four_workers_halve_the_squared_gradient(method: str) -> None:
    """Slope -1/2 between N = 1 and N = 4, by +- 0.08 as the experiment asks; seeds
    together.
    """
    one, four = speedup(method, 1), speedup(method, 4)
    slope = _slope({1: sum(one.values()), 4: sum(four.values())})
    assert slope is not None
    assert abs(slope + 0.5) < 0.08


def test_workers_with_the_same_noise_gain_nothing() -> None:
    """Control: noise that averaging does not lower, and a rate that grows with N."""
    one, four = speedup("control", 1), speedup("control", 4)
    slope = _slope({1: sum(one.values()), 4: sum(four.values())})
    assert slope is not None
    assert slope > -0.2


def test_slope_of_a_line() -> None:
    assert _slope({1: 8.0, 4: 4.0, 16: 2.0}) == pytest.approx(-0.5)
    assert _slope({1: 8.0}) is None


@pytest.mark.slow
def test_gloo_processes_measure_what_the_simulation_does() -> None:
    simulated = speedup("PowerSGD+", 2, steps=15)
    assert speedup("PowerSGD+", 2, "gloo", steps=15) == pytest.approx(simulated, rel=1e-9)
    settings = load("traffic").settings.model_copy(update={"backend": "gloo", "restart_every": 2})
    case = Case("x", {"method": "PowerSGD+ (svd)", "m": 64, "n": 48})
    assert Traffic().run(settings, case, silent)["agrees"]


def test_an_unknown_compressor_is_named() -> None:
    with pytest.raises(ConfigError, match="'powersgdd' is unknown; did you mean 'powersgd'"):
        Crew(1).averager({"compressor": "powersgdd"}, {"X": (4, 3)})
