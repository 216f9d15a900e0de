"""A problem that traps GaLore and lets GoLore go."""

from __future__ import annotations

from typing import Any

import pytest

from lowrank_comm.lab.problems import galore_trap
from lowrank_comm.lab.training.averaging import silent


def trapped(section: dict[str, Any], sigma: float) -> tuple[float, float]:
    """||grad f||^2 at the start and at the end."""
    curve = galore_trap.train(
        section,
        size=10,
        block=4,
        sigma=sigma,
        rate=0.05,
        steps=200,
        seeds=[0],
        every=50,
        progress=silent,
    )[0]
    return curve[0], curve[-1]


def test_galore_never_moves_where_noise_is_stronger_and_golore_does() -> None:
    galore, golore = (
        {"compressor": name, "rank": 4, "restart_every": 10} for name in ("galore", "golore")
    )
    start, end = trapped(galore, sigma=1.0)
    assert start == 1.5
    assert end == pytest.approx(1.5, abs=1e-12)
    # the control: noise below the gradient
    assert trapped(galore, sigma=0.4)[1] < 0.9
    assert trapped(golore, sigma=1.0)[1] < 0.1
