"""EF21 and EF21-SGDM: their limits, the shared y, and how a run without an error memory
resumes.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from lowrank_comm import Atomo, PowerSGD, PowerSGDPlus, RandomProjection
from lowrank_comm.checkpointing.file import load, save
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.error_feedback.ef21 import EF21, with_feedback
from lowrank_comm.error_feedback.options import ErrorFeedback
from lowrank_comm.error_feedback.rounds import dense
from lowrank_comm.numerics.quantization import Quantization
from tests.support.driver import simulation
from tests.support.feedback_runs import N_COLUMNS, M, Run, drawn, optimizer_of, steps
from tests.support.reference import spectrum_matrix


def test_ef21_reaches_a_constant_gradient() -> None:
    """With the best rank-2 part at each step, all ten singular values in five steps;
    each step takes the two largest of what is left. (Without the estimate, a rank-2
    part is all that ever arrives.)
    """
    values = 2.0 ** -np.arange(10)
    x = torch.from_numpy(spectrum_matrix(M, N_COLUMNS, values))
    sim = simulation(
        PowerSGDPlus(rank=2, restart_every=1),
        {"w": (M, N_COLUMNS)},
        2,
        error_feedback=ErrorFeedback(form="ef21"),
    )
    off = [float((sim.reduce([{"w": x}] * 2)["w"] - x).norm() / x.norm()) for _ in range(6)]
    expected = [float(np.sqrt((values[k:] ** 2).sum() / (values**2).sum())) for k in (2, 4, 6, 8)]
    assert off[:4] == pytest.approx(expected, rel=1e-9)
    assert max(off[4:]) < 1e-13
    none = simulation(
        PowerSGDPlus(rank=2, restart_every=1),
        {"w": (M, N_COLUMNS)},
        2,
        error_feedback=ErrorFeedback(form="none"),
    )
    for _ in range(6):
        out = none.reduce([{"w": x}] * 2)["w"]
    assert float((out - x).norm() / x.norm()) == pytest.approx(expected[0], rel=1e-9)


@pytest.mark.parametrize("momentum", [None, 0.3])
@pytest.mark.parametrize(
    "compressor",
    [PowerSGD(rank=2), PowerSGDPlus(rank=2, restart_every=1), RandomProjection(rank=2)],
    ids=lambda c: c.json_name,
)
def test_one_y_for_all_gives_what_a_y_for_each_gives(
    compressor: Compressor, momentum: float | None
) -> None:
    """For a linear compressor: the same trajectory, and the shared y is the mean of the
    workers' own.
    """
    shared, own = (Run(EF21(compressor, momentum, shared=one), 3) for one in (True, False))
    for t in range(12):
        deltas = [drawn(t, worker) for worker in range(3)]
        applied, expected = (dense(run.step(deltas).applied) for run in (shared, own))
        torch.testing.assert_close(applied, expected, rtol=1e-12, atol=1e-12)
    each = torch.stack([state["y"] for state in own.states])
    assert float((each[0] - each[1]).norm() / each[0].norm()) > 0.1
    torch.testing.assert_close(each.mean(0), shared.states[0]["y"], rtol=1e-12, atol=1e-12)


def test_a_compressor_that_is_not_linear_has_a_y_for_each() -> None:
    """And their mean is what all apply; ATOMO with one y for all would go elsewhere."""
    atomo = Atomo(rank=2, contractive=True)
    own, shared = Run(EF21(atomo, None, shared=False), 3), Run(EF21(atomo, None, shared=True), 3)
    for t in range(6):
        deltas = [drawn(t, worker) for worker in range(3)]
        applied, other = dense(own.step(deltas).applied), dense(shared.step(deltas).applied)
        mean = torch.stack([state["y"] for state in own.states]).mean(0)
        torch.testing.assert_close(mean, applied, rtol=1e-12, atol=1e-12)
    assert float((other - applied).norm() / applied.norm()) > 1e-2
    form = ErrorFeedback(form="ef21")
    chosen = with_feedback(atomo, form, linear=False), with_feedback(PowerSGD(), form, linear=True)
    assert [one.private for one in chosen] == [("y",), ()]
    coded = simulation(
        PowerSGD(),
        {"w": (M, N_COLUMNS)},
        2,
        error_feedback=form,
        quantization=Quantization(factors="int8"),
    )
    assert coded.reducers[0].assignment.low_rank_compressor.private == ("y",)


def test_sgdm_averages_the_gradients_and_without_averaging_is_ef21() -> None:
    plain, whole, part = (Run(EF21(PowerSGD(rank=2), a, shared=True), 2) for a in (None, 1.0, 0.25))
    v = None
    for t in range(8):
        deltas = [drawn(t, worker) for worker in range(2)]
        applied = [dense(run.step(deltas).applied) for run in (plain, whole, part)]
        assert torch.equal(applied[0], applied[1])
        v = deltas[0] if v is None else 0.75 * v + 0.25 * deltas[0]
        torch.testing.assert_close(part.states[0]["v"][0], v, rtol=1e-12, atol=1e-14)
    assert float((applied[2] - applied[0]).norm() / applied[0].norm()) > 0.1


def test_the_noise_floor_falls_with_the_workers() -> None:
    """f(X) = ||X||^2 / 2 with noise in every gradient: after the start, E||X||^2 is a
    fourth with four workers.
    """
    floors = {}
    for workers in (1, 4):
        run = Run(EF21(RandomProjection(rank=4), None, shared=True), workers)
        x, squares = torch.zeros(M, N_COLUMNS, dtype=torch.float64), []
        for t in range(500):
            noise = torch.randn(
                4, M, N_COLUMNS, generator=torch.Generator().manual_seed(t), dtype=torch.float64
            )
            x = x - 0.1 * dense(run.step([x + one for one in noise[:workers]]).applied)[0]
            squares.append(float((x**2).sum()))
        floors[workers] = float(np.mean(squares[100:]))
    assert 3 < floors[1] / floors[4] < 5.3


@pytest.mark.parametrize("form", ["none", "ef21", "ef21_sgdm"])
@pytest.mark.parametrize("how", ["state dict", "file"])
def test_without_errors_a_run_resumes_from_what_it_keeps(
    form: str, how: str, tmp_path: Path
) -> None:
    """There is no error memory; y and v go with the bases."""
    options = {"error_feedback": ErrorFeedback(form=form)}
    straight, first, resumed = (optimizer_of(PowerSGD(rank=2), **options) for _ in range(3))
    expected = steps(straight, 0, 9)
    steps(first, 0, 5)
    assert first.error_memory() == {}
    symbols = {"none": set(), "ef21": {"y"}, "ef21_sgdm": {"y", "v", "v_started"}}[form]
    assert set(first.reducer.state.bases()["w"]) == symbols | {"Q"}
    if how == "state dict":
        resumed.load_state_dict(copy.deepcopy(first.state_dict()))
    else:
        save(first.reducer, tmp_path)
        assert load(resumed.reducer, tmp_path)
    resumed.param_groups[0]["params"][0].data.copy_(first.param_groups[0]["params"][0].data)
    assert torch.equal(steps(resumed, 5, 9), expected)
    memory = first.plan.error_bytes
    assert (
        memory
        == {"none": 0, "ef21": 8 * M * N_COLUMNS, "ef21_sgdm": 8 * (2 * M * N_COLUMNS + 1)}[form]
    )
