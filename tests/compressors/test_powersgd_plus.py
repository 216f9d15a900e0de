"""Restarts of PowerSGD+: when, what they capture, and the options that cost no further
bytes.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank_comm import PowerSGD, PowerSGDPlus
from lowrank_comm.communication import Group
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.reduction.reducer import ParamInfo, Reducer
from tests.support.driver import simulation
from tests.support.reference import gradient, spectrum_matrix

SPECTRA = {
    "1/k": lambda count: 1.0 / np.arange(1, count + 1),
    "1/sqrt k": lambda count: np.arange(1, count + 1) ** -0.5,
    "0.7^k": lambda count: 0.7 ** np.arange(count),
    "flat": np.ones,
}
every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA)


def captured(compressor: Compressor, matrix: np.ndarray, draws: int) -> np.ndarray:
    """Share of the energy that the first step applies, for `draws` independent draws:
    one batch of equal matrices with names of their own.
    """
    names = [f"draw{k}" for k in range(draws)]
    given = torch.from_numpy(matrix)
    applied = simulation(compressor, dict.fromkeys(names, matrix.shape), 1).reduce(
        [{name: given.clone() for name in names}]
    )
    return np.array([float(applied[name].norm() ** 2 / given.norm() ** 2) for name in names])


# --- contraction -----------------------------------------------------------------------------------------------------


@every_spectrum
@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (15, 15)])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_lemma_2_for_svd_restarts(spectrum: str, shape: tuple[int, int], rank: int) -> None:
    """||C(Delta) - Delta||^2 <= (1 - r / min(m, n)) ||Delta||^2 for the mean of three
    workers, with equality for a flat spectrum; what is left is exactly the energy of
    the singular values beyond r.
    """
    values = SPECTRA[spectrum](min(shape))
    mean = torch.from_numpy(spectrum_matrix(*shape, values))
    parts = [torch.from_numpy(gradient(shape, 0, worker)) for worker in range(3)]
    parts = [mean + part - sum(parts) / 3 for part in parts]
    applied = simulation(PowerSGDPlus(rank, restart_every=7), {"w": shape}, 3).reduce(
        [{"w": part} for part in parts]
    )["w"]
    left = float((applied - mean).norm() ** 2)
    total = float(mean.norm() ** 2)
    assert left <= (1 - rank / min(shape)) * total * (1 + 1e-12)
    assert left == pytest.approx(float((values[rank:] ** 2).sum()), rel=1e-10)


def test_lemma_2_does_not_hold_for_a_subspace_of_the_past() -> None:
    """Negative control, and the reason for restarts: PowerSGD's single step from a bad
    basis captures less than r / n.
    """
    u, s, v = np.linalg.svd(spectrum_matrix(20, 12, SPECTRA["0.7^k"](12)))
    matrix, worst = torch.from_numpy((u[:, :12] * s) @ v), torch.from_numpy(v[-3:].T.copy())
    sim = simulation(PowerSGD(3), {"w": (20, 12)}, 1, initial_basis={"w": worst})
    applied = sim.reduce([{"w": matrix.clone()}])["w"]
    assert float(applied.norm() ** 2) < 0.1 * 3 / 12 * float(matrix.norm() ** 2)


DRAWS = 300


@every_spectrum
def test_randomized_restarts_capture_their_share_in_expectation(spectrum: str) -> None:
    """A fresh Gaussian Q captures at least r / n of the energy on average, Lemma 2's
    constant; with the extra iteration of restart="randomized", more. PowerSGD's very
    first step is the restart without that iteration, since its Q is Gaussian too.
    """
    m, n, rank = 64, 32, 4
    matrix = spectrum_matrix(m, n, SPECTRA[spectrum](n))
    sketch = captured(PowerSGD(rank), matrix, DRAWS)
    iterated = captured(PowerSGDPlus(rank, restart="randomized"), matrix, DRAWS)
    best = captured(PowerSGDPlus(rank), matrix, 1)[0]
    standard_error = 3 * sketch.std() / DRAWS**0.5
    assert sketch.mean() + standard_error >= rank / n - 1e-12
    assert iterated.mean() >= sketch.mean() - 1e-12
    assert iterated.max() <= best + 1e-12
    # all subspaces are equal there
    if spectrum != "flat":
        assert iterated.mean() > sketch.mean() + 3 * (sketch.std() + iterated.std()) / DRAWS**0.5
        assert iterated.mean() > 0.85 * best
    # Negative control: the same bound fails for a random projector on the long side
    # that never saw the matrix.
    generator = np.random.default_rng(0)
    blind = [
        np.linalg.norm(np.linalg.qr(generator.standard_normal((m, rank)))[0].T @ matrix) ** 2
        / np.linalg.norm(matrix) ** 2
        for _ in range(DRAWS)
    ]
    assert np.mean(blind) + 3 * np.std(blind) / DRAWS**0.5 < rank / n


@every_spectrum
def test_another_power_iteration_never_captures_less(spectrum: str) -> None:
    """On a matrix that does not change: PowerSGD's steps capture more and more (the
    error memory is taken off, so that Delta is the same).
    """
    matrix = torch.from_numpy(spectrum_matrix(24, 16, SPECTRA[spectrum](16)))
    sim = simulation(PowerSGD(3), {"w": (24, 16)}, 1)
    energy = [
        float(sim.reduce([{"w": matrix - sim.error_memory(0)["w"]}])["w"].norm()) for _ in range(8)
    ]
    assert all(later >= earlier * (1 - 1e-12) for earlier, later in itertools.pairwise(energy))


def test_each_randomized_restart_draws_anew() -> None:
    """Two restarts on one matrix, one name: independent subspaces. (A draw that repeats
    would not average over bad luck.)
    """
    matrix = torch.from_numpy(spectrum_matrix(30, 20, np.ones(20)))
    sim = simulation(PowerSGDPlus(2, restart_every=1, restart="randomized"), {"w": (30, 20)}, 1)
    first = sim.reduce([{"w": matrix.clone()}])["w"]
    error = sim.error_memory(0)["w"].clone()
    # the same Delta again
    second = sim.reduce([{"w": matrix - error}])["w"]
    assert float((second - first).norm() / first.norm()) > 0.1


# --- when ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restart", ["svd", "randomized"])
@pytest.mark.parametrize("tau", [1, 3, 4])
def test_restarts_come_every_tau_steps_from_the_first(restart: str, tau: int) -> None:
    sim = simulation(
        PowerSGDPlus(2, restart_every=tau, restart=restart),
        {"a": (9, 6), "b": (6, 9), "c": (9, 6)},
        2,
    )
    seen = []
    for t in range(10):
        sim.reduce(
            [
                {
                    name: torch.from_numpy(gradient(shape, t, worker))
                    for name, shape in (("a", (9, 6)), ("b", (6, 9)), ("c", (9, 6)))
                }
                for worker in range(2)
            ]
        )
        seen.append(sim.last_reports[0].restarts)
    assert seen == [3 if t % tau == 0 else 0 for t in range(10)]


def restarted_by_step(
    shapes: dict[str, tuple[int, ...]], tau: int, steps: int
) -> tuple[list[set[str]], list[int]]:
    """Which matrices restarted at each step, told from outside: with exact_restart they
    are those without error afterwards.
    """
    sim = simulation(
        PowerSGDPlus(1, restart_every=tau, stagger=True, exact_restart=True), shapes, 1
    )
    names, restart_bytes = [], []
    for t in range(steps):
        sim.reduce(
            [
                {
                    name: torch.from_numpy(gradient(shape, t, 0, k))
                    for k, (name, shape) in enumerate(shapes.items())
                }
            ]
        )
        names.append({name for name, error in sim.error_memory(0).items() if not error.any()})
        restart_bytes.append(sim.last_reports[0].bytes.get("restart", 0))
        assert sim.last_reports[0].restarts == len(names[-1])
    return names, restart_bytes


def test_staggered_restarts_are_once_a_period_and_level() -> None:
    tau = 6
    equal = {f"w{k:02}": (8, 5) for k in range(12)}
    names, restart_bytes = restarted_by_step(equal, tau, 1 + 3 * tau)
    assert names[0] == set(equal)
    for period in range(3):
        steps = names[1 + period * tau : 1 + (period + 1) * tau]
        # each once
        assert sorted(name for step in steps for name in step) == sorted(equal)
        # at the same place in every period
        assert steps == names[1 : 1 + tau]
    assert restart_bytes[0] == 12 * 8 * 5 * 8
    # 12 equal matrices over 6 steps
    assert set(restart_bytes[1:]) == {2 * 8 * 5 * 8}


def test_staggered_restarts_of_unequal_matrices_are_level_too() -> None:
    tau = 5
    shapes = {f"w{k:02}": (4 + 2 * k, 3 + k % 4) for k in range(17)}
    names, restart_bytes = restarted_by_step(shapes, tau, 1 + tau)
    assert sorted(name for step in names[1:] for name in step) == sorted(shapes)
    sizes = [8 * m * n for m, n in shapes.values()]
    assert max(restart_bytes[1:]) <= sum(sizes) / tau + max(sizes)
    assert min(restart_bytes[1:]) >= sum(sizes) / tau - max(sizes)
    assert restart_bytes[0] == sum(sizes)


def test_restarts_of_a_pass_that_is_rolled_back_are_not_counted() -> None:
    slots = [ParamInfo("w", (12, 7), torch.float64, torch.device("cpu"))]
    reducer = Reducer(slots, PowerSGDPlus(2, restart_every=2), Group(), min_compression_rate=0)
    for commits in (False, True, True, True):
        reducer.reduce([torch.from_numpy(gradient((12, 7), 0, 0))])
        reducer.commit() if commits else reducer.rollback()
    # t = 0 and t = 2
    assert reducer.ledger.restarts == 2
    assert reducer.ledger.steps == 4


def test_without_stagger_all_restart_together() -> None:
    sim = simulation(PowerSGDPlus(1, restart_every=4), {f"w{k}": (8, 5) for k in range(6)}, 1)
    counts = []
    for t in range(9):
        sim.reduce([{f"w{k}": torch.from_numpy(gradient((8, 5), t, 0, k)) for k in range(6)}])
        counts.append(sim.last_reports[0].restarts)
    assert counts == [6, 0, 0, 0, 6, 0, 0, 0, 6]


# --- the options that are free ---------------------------------------------------------------------------------------


def run(
    compressor: Compressor, steps: int, workers: int = 3
) -> tuple[list[Tensor], list[list[Tensor]], list[Tensor]]:
    """What was applied, every worker's error, and the mean gradient, step by step."""
    shape = (11, 8)
    sim = simulation(compressor, {"w": shape}, workers)
    applied, errors, means = [], [], []
    for t in range(steps):
        gradients = [torch.from_numpy(gradient(shape, t, worker)) for worker in range(workers)]
        means.append(sum(gradients) / workers)
        applied.append(sim.reduce([{"w": g.clone()} for g in gradients])["w"])
        errors.append([sim.error_memory(worker)["w"].clone() for worker in range(workers)])
    return applied, errors, means


def test_exact_restart_applies_everything_and_clears_the_error() -> None:
    tau = 4
    applied, errors, means = run(PowerSGDPlus(2, restart_every=tau, exact_restart=True), 10)
    for t in range(10):
        if t % tau == 0:
            assert all(not error.any() for error in errors[t])
            torch.testing.assert_close(
                sum(applied[: t + 1]), sum(means[: t + 1]), rtol=1e-11, atol=1e-11
            )
        else:
            assert all(float(error.norm()) > 1e-2 for error in errors[t])
    # The subspace of the restart is used by the next step: the same as without the
    # option, as far as the first period goes.
    plain, _, _ = run(PowerSGDPlus(2, restart_every=tau), 1)
    assert float((plain[0] - means[0]).norm()) > 1e-2


def test_consensus_restart_changes_no_trajectory_and_makes_errors_equal() -> None:
    tau = 4
    applied, errors, _ = run(PowerSGDPlus(2, restart_every=tau, consensus_restart=True), 20)
    plain, plain_errors, _ = run(PowerSGDPlus(2, restart_every=tau), 20)
    for t in range(20):
        torch.testing.assert_close(applied[t], plain[t], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(sum(errors[t]), sum(plain_errors[t]), rtol=1e-12, atol=1e-12)
        spread = max(float((error - errors[t][0]).norm()) for error in errors[t])
        assert spread < 1e-12 if t % tau == 0 else spread > 1e-2
        assert max(float((error - plain_errors[t][0]).norm()) for error in plain_errors[t]) > 1e-2
