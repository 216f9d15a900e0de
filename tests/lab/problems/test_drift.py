"""A problem on which an averaged residual drifts."""

from __future__ import annotations

from typing import Any

import pytest

from lowrank_comm.lab.problems import drift, teacher
from lowrank_comm.lab.training.averaging import silent


def drifted(
    section: dict[str, Any], averaged: bool, checkpoints: tuple[int, ...], noise: float = 0.5
) -> dict[str, Any]:
    return drift.measure(
        section,
        averaged=averaged,
        gradients=[(0.0, noise)],
        workers=2,
        shape=(8, 4),
        checkpoints=checkpoints,
        seeds=[0, 1],
        progress=silent,
    )[0]


def test_the_averaged_residual_drifts_and_the_local_one_does_not() -> None:
    section = {"compressor": "powersgd", "rank": 1}
    local = drifted(section, False, (50, 400))["deviation"]
    averaged = drifted(section, True, (50, 400))["deviation"]
    assert local["400"] < 1.8 * local["50"]
    # a random walk: sqrt(8) = 2.8 in expectation
    assert averaged["400"] > 1.8 * averaged["50"]


def test_sixteen_bits_lose_what_thirty_two_keep() -> None:
    section = {"compressor": "powersgd", "rank": 1}
    bf16 = section | {"error_feedback": {"dtype": "bfloat16"}}
    assert drifted(section, False, (100,))["lost"]["100"] < 1e-6
    assert 1e-4 < drifted(bf16, False, (100,))["lost"]["100"] < 1e-1


def test_copies_in_one_batch_are_copies_alone() -> None:
    problem = teacher.TeacherProblem(steps=20, workers=2)
    section = {"compressor": "powersgd_plus", "rank": 2, "restart_every": 5}
    pairs = [(0, 0.1), (0, 0.3), (7, 0.1)]
    together_ = teacher.train(problem, section, pairs, 0.9, silent)["final"]
    alone = [teacher.train(problem, section, [pair], 0.9, silent)["final"][0] for pair in pairs]
    assert together_ == pytest.approx(alone, rel=1e-9)
    assert len(set(together_)) == 3
