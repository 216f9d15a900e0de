"""Forms of error feedback: EF21 and EF21-SGDM, none, and several rounds; what is
refused, kept and resumed.

That every compressor keeps the mass, vetoes and resumes inside each form is shown by
the conformance suite.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank_comm import (
    Atomo,
    CompressedOptimizer,
    GaLore,
    GreedyLore,
    Identity,
    PowerSGD,
    PowerSGDPlus,
    RandomProjection,
)
from lowrank_comm.checkpointing.file import load, save
from lowrank_comm.checkpointing.tag import tag_of
from lowrank_comm.checkpointing.tensors import restore, tensors_of
from lowrank_comm.compressors.base import Compressor, Context, Result
from lowrank_comm.error_feedback.ef21 import EF21, with_feedback
from lowrank_comm.error_feedback.options import ErrorFeedback
from lowrank_comm.error_feedback.rounds import Rounds, dense
from lowrank_comm.errors import ConfigError, StateMismatchError
from lowrank_comm.numerics.quantization import Quantization
from lowrank_comm.simulation import Simulation
from tests.support.driver import at, drive, simulation
from tests.support.reference import gradient, spectrum_matrix

M, N_COLUMNS = 20, 10


def drawn(t: int, worker: int) -> Tensor:
    return torch.from_numpy(gradient((M, N_COLUMNS), t, worker))


class Run:
    """Workers that repeat a compressor, from t = 0."""

    def __init__(self, compressor: Compressor, workers: int) -> None:
        self.compressor = compressor
        schedule = compressor.schedule({"w": 1})
        self.context = Context(("w",), 0, 0, compressor.rank, restart=schedule is not None, m=M)
        like = torch.empty(0, dtype=torch.float64)
        self.states = [
            compressor.initial_state(self.context, M, N_COLUMNS, like) for _ in range(workers)
        ]

    def step(self, deltas: list[Tensor]) -> Result:
        """The first worker's result; compressors with restarts restart every time."""
        results = drive(
            self.compressor, [delta[None] for delta in deltas], self.states, self.context
        )
        self.states = [result.state for result in results]
        self.context = at(self.compressor, self.context, self.context.t + 1, self.context.restart)
        return results[0]


# --- EF21 ------------------------------------------------------------------------------------------------------------


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
    assert coded.reducers[0].assignment.scheme.private == ("y",)


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


# --- none ------------------------------------------------------------------------------------------------------------


def optimizer_of(compressor: Compressor, **more: Any) -> CompressedOptimizer:
    w = torch.nn.Parameter(torch.zeros(M, N_COLUMNS, dtype=torch.float64))
    return CompressedOptimizer(
        torch.optim.SGD([("w", w)], lr=0.1), compressor, min_compression_rate=0, **more
    )


def steps(optimizer: CompressedOptimizer, start: int, stop: int) -> Tensor:
    (w,) = optimizer.param_groups[0]["params"]
    for t in range(start, stop):
        w.grad = drawn(t, 0)
        optimizer.step()
    return w.detach().clone()


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


@pytest.mark.parametrize("form", ["none", "ef21"])
def test_errors_are_not_lost_without_a_word(form: str) -> None:
    """A state with errors does not go into a run without an error memory; the other way
    round they start from zero, whatever the run held before.
    """
    old = optimizer_of(PowerSGD(rank=2))
    new = optimizer_of(PowerSGD(rank=2), error_feedback=ErrorFeedback(form=form))
    steps(old, 0, 3)
    steps(new, 0, 5)
    with pytest.raises(StateMismatchError, match=r"'w' has a saved error memory.*error_feedback"):
        new.load_state_dict(copy.deepcopy(old.state_dict()))
    assert new.reducer.step == 5
    assert float(old.error_memory()["w"].norm()) > 0
    restore(
        old.reducer, tag_of(new.reducer), {"w": {"Q": tensors_of(new.reducer)["w"]["Q"].clone()}}
    )
    assert torch.equal(old.reducer.state.bases()["w"]["Q"], new.reducer.state.bases()["w"]["Q"])
    assert float(old.error_memory()["w"].norm()) == 0


# --- rounds ----------------------------------------------------------------------------------------------------------


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
        alone = PowerSGDPlus(rank=2, restart_every=2).elements_at(M, N_COLUMNS, 2, t, restart)
        assert scheme.elements_at(M, N_COLUMNS, 2, t, restart) == p * alone
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


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "options"),
    [
        ("form", {"form": "ef22"}),
        ("dtype", {"form": "ef21", "dtype": "bfloat16"}),
        ("rounding", {"form": "ef21", "rounding": "stochastic"}),
        ("offload", {"form": "none", "offload": True}),
        ("momentum", {"form": "ef21", "momentum": 0.5}),
        ("momentum", {"momentum": 0.5}),
        ("momentum", {"form": "ef21_sgdm", "momentum": 0.0}),
        ("momentum", {"form": "ef21_sgdm", "momentum": True}),
        ("rounds", {"rounds": 0}),
        ("rounds", {"rounds": 2.0}),
    ],
)
def test_what_has_no_meaning_is_refused(key: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=rf"error_feedback\.{key}\b"):
        ErrorFeedback(**options)


@pytest.mark.parametrize(
    ("compressor", "options", "words"),
    [
        (PowerSGDPlus(2, consensus_restart=True), {"form": "ef21"}, "consensus_restart=True.*ef21"),
        (PowerSGDPlus(2, consensus_restart=True), {"form": "none"}, "consensus_restart=True.*none"),
        (PowerSGDPlus(2, exact_restart=True), {"rounds": 2}, "exact_restart=True.*rounds=2"),
        (GaLore(2, apply_full=True), {"rounds": 3}, "apply_full=True.*rounds=3"),
    ],
    ids=str,
)
def test_options_without_effect_are_refused(
    compressor: Compressor, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        Simulation({"w": (8, 6)}, compressor, 2, error_feedback=ErrorFeedback(**options))
    Simulation({"w": (8, 6)}, compressor, 2)


@pytest.mark.parametrize(
    "options", [{"form": "ef14"}, {"form": "ef21"}, {"form": "ef21_sgdm"}, {"rounds": 2}], ids=str
)
@pytest.mark.parametrize(
    "compressor",
    [Atomo(rank=2), RandomProjection(rank=2, form="unbiased")],
    ids=lambda c: c.json_name,
)
def test_an_unbiased_compressor_has_no_feedback_and_no_rounds(
    options: dict[str, Any], compressor: Compressor
) -> None:
    with pytest.raises(ConfigError, match="contractive"):
        optimizer_of(compressor, error_feedback=ErrorFeedback(**options)).plan  # noqa: B018
    assert ErrorFeedback().for_compressor(compressor).form == "none"
