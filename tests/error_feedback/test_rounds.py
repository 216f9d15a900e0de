"""Rounds: each takes its share of what the ones before it left, and all are counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from lowrank_comm import GreedyLore, Identity, PowerSGD, PowerSGDPlus, RandomProjection
from lowrank_comm.compressors.base import Context
from lowrank_comm.error_feedback.ef21 import with_feedback
from lowrank_comm.error_feedback.options import ErrorFeedback
from lowrank_comm.error_feedback.rounds import Rounds, dense
from lowrank_comm.simulation import Simulation
from tests.support.driver import drive, elements_at
from tests.support.feedback_runs import N_COLUMNS, M, Run, drawn
from tests.support.reference import spectrum_matrix


def test_each_round_takes_its_share_of_what_is_left() -> None:
    """E||R_p||^2 / ||Delta||^2 = (1 - r/s)^p for a random subspace of r of s
    dimensions, drawn anew in each round, and below that for a sketch, whose subspace is
    of the matrix; within 4.5 standard errors of 200 draws. With one draw for all
    rounds, the second would find nothing.
    """
    x = torch.from_numpy(spectrum_matrix(M, N_COLUMNS, 1.0 / np.arange(1, 11)))
    for compressor in (RandomProjection(rank=2), PowerSGD(rank=2)):
        for p in (1, 2, 3):
            left = []
            for seed in range(120):
                context = Context(("w",), 0, seed, 2, m=M)
                scheme = with_feedback(compressor, ErrorFeedback(rounds=p), linear=True)
                state = scheme.initial_state(
                    context, M, N_COLUMNS, torch.empty(0, dtype=torch.float64)
                )
                (result,) = drive(scheme, [x[None]], [state], context)
                torch.testing.assert_close(dense(result.applied), dense(result.sent))
                left.append(float((x - dense(result.sent)[0]).norm() / x.norm()) ** 2)
            bound, error = 0.8**p, float(np.std(left)) / 120**0.5
            assert np.mean(left) < bound + 4.5 * error
            assert (np.mean(left) > bound - 4.5 * error) == isinstance(compressor, RandomProjection)


@pytest.mark.parametrize("p", [1, 2, 3])
@pytest.mark.parametrize("form", ["ef14", "ef21"])
def test_every_round_counts(p: int, form: str) -> None:
    """p r (m + n) elements on the wire, in the plan, and for the decision between
    low-rank and dense.
    """
    options: dict[str, Any] = {
        "error_feedback": ErrorFeedback(rounds=p, form=form),
        "dtype": torch.float64,
    }
    sim = Simulation(
        {"w": (M, N_COLUMNS)}, PowerSGD(rank=2), 2, min_compression_rate=1.0, **options
    )
    sim.reduce([{"w": drawn(0, k)} for k in range(2)])
    plan = sim.reducers[0].plan
    assert sim.last_reports[0].bytes["factors"] == plan.step_bytes == 8 * p * 2 * (M + N_COLUMNS)
    assert plan.rows[0].elements == p * 2 * (M + N_COLUMNS)
    strict = Simulation(
        {"w": (M, N_COLUMNS)}, PowerSGD(rank=2), 2, min_compression_rate=2.0, **options
    )
    # 200 / 60, / 120, / 180
    assert strict.reducers[0].plan.rows[0].scheme == ("low_rank" if p == 1 else "dense")
    scheme = with_feedback(
        PowerSGDPlus(rank=2, restart_every=2), options["error_feedback"], linear=True
    )
    for t, restart in ((0, True), (1, False)):
        alone = elements_at(PowerSGDPlus(rank=2, restart_every=2), M, N_COLUMNS, 2, t, restart)
        assert elements_at(scheme, M, N_COLUMNS, 2, t, restart) == p * alone
    identity = Simulation({"w": (M, N_COLUMNS)}, Identity(), 2, min_compression_rate=0, **options)
    assert identity.reducers[0].plan.rows[0].scheme == "dense"


def test_each_round_follows_a_subspace_of_its_own() -> None:
    """On a constant gradient, from Q of each round: the first two directions, the next
    two, and so on.
    """
    left, values, right = np.linalg.svd(
        spectrum_matrix(M, N_COLUMNS, 2.0 ** -np.arange(10)), full_matrices=False
    )
    x = torch.from_numpy((left * values) @ right)
    run = Run(Rounds(PowerSGD(rank=2), 3), 1)
    for _ in range(25):
        result = run.step([x])
    assert set(result.state) == {"Q", "Q_round1", "Q_round2"}
    for k, symbol in enumerate(("Q", "Q_round1", "Q_round2")):
        basis = torch.linalg.qr(result.state[symbol][0]).Q
        wanted = torch.from_numpy(right[2 * k : 2 * k + 2])
        assert float((wanted @ basis).norm() ** 2) == pytest.approx(2, abs=1e-6)
    assert float((x - dense(result.sent)[0]).norm()) == pytest.approx(
        float(np.linalg.norm(values[6:])), rel=1e-6
    )


def test_a_restart_that_sends_everything_serves_all_rounds() -> None:
    """GreedyLore's refresh is on the wire once, whatever the rounds; its basis is every
    round's, and later rounds choose other columns of it than the first.
    """
    options: dict[str, Any] = {"min_compression_rate": 1.0, "dtype": torch.float64}
    sim = Simulation(
        {"w": (M, N_COLUMNS)},
        GreedyLore(rank=2, restart_every=4),
        2,
        error_feedback=ErrorFeedback(rounds=2),
        **options,
    )
    alone = Simulation({"w": (M, N_COLUMNS)}, GreedyLore(rank=2, restart_every=4), 2, **options)
    gradients = [{"w": drawn(0, k)} for k in range(2)]
    for t in range(3):
        for each in (sim, alone):
            each.reduce(gradients)
        counted = [dict(each.last_reports[0].bytes) for each in (sim, alone)]
        if t == 0:
            assert counted[0] == counted[1]
            state = sim.reducers[0].state.bases()["w"]
            assert torch.equal(state["U"], state["U_round1"])
        else:
            assert counted[0]["factors"] == 2 * counted[1]["factors"]
    error, error_alone = (
        sum(each.error_memory(k)["w"] for k in range(2)).norm() for each in (sim, alone)
    )
    assert float(error) < 0.8 * float(error_alone)
