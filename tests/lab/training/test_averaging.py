"""Averaging among the processes of an experiment."""

from __future__ import annotations

import pytest
import torch

from lowrank_comm import LowRankCommError
from lowrank_comm.lab.training.averaging import Crew, agreed

POWERSGD_PLUS = {"compressor": "powersgd_plus", "rank": 2, "restart_every": 5}


def test_processes_that_disagree_are_noticed() -> None:
    assert agreed([{"a": 1.0}] * 3) == {"a": 1.0}
    with pytest.raises(LowRankCommError, match="different results"):
        agreed([1.0, 1.0, 1.0 + 1e-15])


def test_a_gradient_that_is_not_finite_is_an_error() -> None:
    averager = Crew(2).averager(POWERSGD_PLUS, {"X": (4, 3)})
    with pytest.raises(LowRankCommError, match="not finite"):
        averager.average([{"X": torch.full((4, 3), torch.nan)}, {"X": torch.zeros(4, 3)}])
