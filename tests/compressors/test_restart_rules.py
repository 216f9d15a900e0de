"""PowerSGD with several power iterations, and PowerSGD+'s restarts by greedy choice and
by random projection.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lowrank_comm import ConfigError, PowerSGD, PowerSGDPlus
from lowrank_comm.compressors.base import Compressor, Context
from lowrank_comm.compressors.subspaces import random_basis
from lowrank_comm.config import Section
from lowrank_comm.numerics.randomness import gaussian
from tests.support import checks
from tests.support.checks import Driven
from tests.support.driver import dense, simulation
from tests.support.gloo import GlooPool
from tests.support.reference import gradient, spectrum_matrix, ssp_comp

SCHEMES = [
    PowerSGD(2, power_iterations=3),
    PowerSGDPlus(2, restart_every=2, restart="greedy", basis_every=2),
    PowerSGDPlus(
        2, restart_every=3, restart="greedy", basis_every=3, basis=4, probes=1, power_iterations=2
    ),
    PowerSGDPlus(2, restart_every=3, restart="random_projection"),
]
every_scheme = pytest.mark.parametrize("scheme", SCHEMES, ids=repr)


@pytest.mark.parametrize("check", checks.LINEAR, ids=lambda check: check.__name__)
@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[1], SCHEMES[3]], ids=repr)
def test_invariants(scheme: Compressor, check: Callable[[Compressor], None]) -> None:
    check(scheme)


@pytest.mark.parametrize("scheme", [SCHEMES[1], SCHEMES[3]], ids=repr)
def test_gloo_equals_simulation(gloo: GlooPool, scheme: Compressor) -> None:
    checks.processes_equal_simulation(gloo, scheme)


@every_scheme
def test_bytes_over_two_periods_of_the_basis(scheme: Compressor) -> None:
    checks.bytes_are_as_said(scheme, 18)


def test_the_formulas_of_the_bytes() -> None:
    assert PowerSGD(2, power_iterations=3).elements(100, 50, 2) == 3 * 2 * 150
    assert (
        PowerSGDPlus(2, restart="randomized", power_iterations=2).restart_elements(100, 50, 2)
        == 3 * 2 * 150
    )
    assert PowerSGDPlus(2, power_iterations=2).restart_elements(100, 50, 2) == 100 * 50 + 100 * 2
    assert PowerSGDPlus(2, restart="random_projection").restart_elements(50, 100, 2) == 2 * 100
    greedy = PowerSGDPlus(
        2, restart_every=10, restart="greedy", basis_every=3, basis="full", probes=2
    )
    between = 2 * 150 + 2 * 50
    found = 100 * 50 + 50 * 50
    costs = [greedy.elements_at(100, 50, 2, t, True) for t in range(0, 70, 10)]
    assert costs == [found, between, between, found, between, between, found]
    # their mean, rounded up
    assert greedy.restart_elements(100, 50, 2) == -(-(found + 2 * between) // 3)
    assert greedy.elements_at(100, 50, 2, 5, False) == 2 * 150


@every_scheme
def test_compression_is_an_orthogonal_projection(scheme: Compressor) -> None:
    """Lemma 1: what is applied is orthogonal to what is left of the mean."""
    for shape in ((8, 10), (10, 8)):
        driven = Driven(scheme, shape, 2)
        for t in range(8):
            results = driven.step(
                [torch.from_numpy(gradient(shape, t, worker)) for worker in range(2)]
            )
            mean = torch.stack(driven.deltas).mean(0)
            applied = dense(results[0].applied)
            assert abs(float((applied * (mean - applied)).sum())) < 1e-10 * float(mean.norm()) ** 2


@pytest.mark.parametrize("scheme", SCHEMES[1:], ids=repr)
def test_the_report_of_the_norms(scheme: Compressor) -> None:
    """Captured energy and the norm of the errors, where the orthonormal factor is
    sometimes P and sometimes Q.
    """
    shapes = {"tall": (13, 7), "wide": (6, 11)}
    sim = simulation(scheme, shapes)
    for t in range(6):
        given = checks.drawn(t, 0, shapes)
        delta = {name: g + sim.error_memory(0)[name] for name, g in given.items()}
        out = sim.reduce([{name: g.clone() for name, g in given.items()}])
        total = sum(float(d.norm()) ** 2 for d in delta.values())
        captured = sum(float(a.norm()) ** 2 for a in out.values()) / total
        error = sum(float(e.norm()) ** 2 for e in sim.error_memory(0).values()) ** 0.5
        assert sim.last_reports[0].captured_energy == pytest.approx(captured, rel=1e-9)
        assert sim.last_reports[0].error_norm == pytest.approx(error, rel=1e-9)


# --- power iterations ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("iterations", [1, 2, 4])
@pytest.mark.parametrize("workers", [1, 3])
def test_fifteen_steps_of_power_iterations_as_written(workers: int, iterations: int) -> None:
    """SSP-Comp repeated on one Delta, in NumPy; only the last Q_i is sent."""
    shape = (12, 7)
    basis = np.random.default_rng(7).standard_normal((7, 2))
    q, errors = basis, [np.zeros(shape) for _ in range(workers)]
    sim = simulation(
        PowerSGD(2, power_iterations=iterations),
        {"w": shape},
        workers,
        initial_basis={"w": torch.from_numpy(basis)},
    )
    for t in range(15):
        gradients = [gradient(shape, t, worker) for worker in range(workers)]
        deltas = [g + e for g, e in zip(gradients, errors, strict=True)]
        for _ in range(iterations):
            result = ssp_comp(q, deltas)
            q = result.basis
        errors = [d - s for d, s in zip(deltas, result.sent, strict=True)]
        applied = sim.reduce([{"w": torch.from_numpy(g.copy())} for g in gradients])["w"]
        np.testing.assert_allclose(applied.numpy(), result.applied, rtol=1e-9, atol=1e-9)
        for worker in range(workers):
            np.testing.assert_allclose(
                sim.error_memory(worker)["w"].numpy(), errors[worker], rtol=1e-9, atol=1e-9
            )


def test_more_iterations_capture_more() -> None:
    """The first step, a Gaussian Q: k iterations on the spectrum 1/sqrt k; each more
    than the last one, none more than the singular vectors.
    """
    matrix = torch.from_numpy(spectrum_matrix(24, 16, np.arange(1, 17) ** -0.5))
    captured = []
    for k in (1, 2, 3, 6):
        applied = simulation(PowerSGD(3, power_iterations=k), {"w": (24, 16)}).reduce(
            [{"w": matrix.clone()}]
        )["w"]
        captured.append(float((applied.norm() / matrix.norm()) ** 2))
    best = float((torch.linalg.svdvals(matrix)[:3] ** 2).sum() / matrix.norm() ** 2)
    assert all(later > earlier + 1e-3 for earlier, later in itertools.pairwise(captured))
    assert captured[-1] <= best + 1e-12


# --- random projection -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(20, 12), (12, 20), (15, 15)])
def test_a_random_projection_captures_its_share_of_the_short_side(shape: tuple[int, int]) -> None:
    """delta = r / min(m, n) exactly in expectation, whatever the spectrum: 800 draws, 4
    standard errors. (On the long side it would be r / max(m, n), which differs by more
    than that: control.)
    """
    names, rank = [f"draw{k}" for k in range(800)], 3
    matrix = torch.from_numpy(spectrum_matrix(*shape, 0.7 ** np.arange(min(shape))))
    scheme = PowerSGDPlus(rank, restart="random_projection")
    applied = simulation(scheme, dict.fromkeys(names, shape)).reduce(
        [{name: matrix.clone() for name in names}]
    )
    captured = np.array([float((applied[name].norm() / matrix.norm()) ** 2) for name in names])
    error = captured.std() / len(names) ** 0.5
    assert captured.mean() == pytest.approx(rank / min(shape), abs=4 * error)
    assert min(shape) == max(shape) or abs(captured.mean() - rank / max(shape)) > 4 * error


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_the_step_after_a_random_projection_uses_its_subspace(shape: tuple[int, int]) -> None:
    """Two steps in NumPy from the library's draw of V."""
    scheme = PowerSGDPlus(2, restart_every=5, restart="random_projection")
    sim = simulation(scheme, {"w": shape}, 2, seed=4)
    z = gaussian(4, ("w",), 0, "restart V", (7, 2), torch.float64, torch.device("cpu"))[0].numpy()
    v = np.linalg.qr(z)[0]
    first, second = ([gradient(shape, t, worker) for worker in range(2)] for t in range(2))
    applied = sim.reduce([{"w": torch.from_numpy(g.copy())} for g in first])["w"].numpy()
    project = (lambda a: a @ v @ v.T) if shape[0] > shape[1] else (lambda a: v @ v.T @ a)
    np.testing.assert_allclose(applied, project(first[0] + first[1]) / 2, atol=1e-12)
    q = v if shape[0] > shape[1] else ((first[0] + first[1]) / 2).T @ v
    result = ssp_comp(q, [g + f - project(f) for g, f in zip(second, first, strict=True)])
    applied = sim.reduce([{"w": torch.from_numpy(g.copy())} for g in second])["w"].numpy()
    np.testing.assert_allclose(applied, result.applied, atol=1e-11)


def test_the_random_basis_is_uniform() -> None:
    """E P P^T = (r / s) I: 4 000 draws."""
    names = tuple(f"draw{k}" for k in range(4000))
    p = random_basis(Context(names, 0, 0, 2), "test", 6, 2, torch.empty(0, dtype=torch.float64))
    torch.testing.assert_close(
        p.mT @ p, torch.eye(2, dtype=torch.float64).expand(4000, 2, 2), rtol=0, atol=1e-12
    )
    projectors = p @ p.mT
    error = projectors.std(0) / len(names) ** 0.5
    # of 36 entries
    assert float(((projectors.mean(0) - torch.eye(6) / 3).abs() / error).max()) < 4.5


# --- greedy ----------------------------------------------------------------------------------------------------------


def test_a_restart_that_finds_a_basis_is_the_svds() -> None:
    """Where D is on the wire anyway, the leading r directions of the basis are applied:
    SVD-Comp's numbers.
    """
    shapes = {"tall": (12, 7), "wide": (7, 12)}
    greedy, svd = (
        simulation(PowerSGDPlus(2, restart_every=3, **options), shapes, 2)
        for options in ({"restart": "greedy", "basis_every": 1}, {"restart": "svd"})
    )
    for t in range(9):
        gradients = [checks.drawn(t, worker, shapes) for worker in range(2)]
        one, other = (
            s.reduce([{k: g.clone() for k, g in w.items()} for w in gradients])
            for s in (greedy, svd)
        )
        for name in shapes:
            torch.testing.assert_close(one[name], other[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("shape", [(12, 8), (8, 12)])
@pytest.mark.parametrize("spectrum", ["flat", "1/k"])
def test_contraction_of_a_greedy_restart_with_an_old_basis(
    spectrum: str, shape: tuple[int, int]
) -> None:
    """A basis from a matrix that has nothing to do with the later one: delta >= r /
    min(m, n) in expectation, 500 draws, 3 standard errors; and more than the columns
    alone capture, since a power iteration follows.
    """
    values = {"flat": np.ones(8), "1/k": 1.0 / np.arange(1, 9)}[spectrum]
    old, new = (torch.from_numpy(spectrum_matrix(*shape, values, seed)) for seed in (1, 2))
    names = [f"draw{k}" for k in range(500)]
    scheme = PowerSGDPlus(
        2, restart_every=1, restart="greedy", basis_every=2, basis="full", probes=1
    )
    sim = simulation(scheme, dict.fromkeys(names, shape))
    sim.reduce([{name: old.clone() for name in names}])
    errors = sim.error_memory(0)
    applied = sim.reduce([{name: new - errors[name] for name in names}])
    captured = np.array([float((applied[name].norm() / new.norm()) ** 2) for name in names])
    error = captured.std() / len(names) ** 0.5
    assert captured.mean() >= 2 / 8 - 3 * error - 1e-12
    if spectrum == "1/k":
        assert captured.mean() > 2 / 8 + 5 * error


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_fifteen_steps_of_greedy_restarts_as_written(shape: tuple[int, int], workers: int) -> None:
    """tau = 3, a basis every second restart, two probes, in NumPy; for m < n on the
    transpose. Step 3 chooses from the basis of step 0.
    """
    sim = simulation(
        PowerSGDPlus(2, restart_every=3, restart="greedy", basis_every=2, basis="full", probes=2),
        {"w": shape},
        workers,
        seed=6,
    )
    tall = shape[0] >= shape[1]
    errors = [np.zeros(shape) for _ in range(workers)]
    u, q = np.zeros(0), np.zeros(0)
    for t in range(15):
        gradients = [gradient(shape, t, worker) for worker in range(workers)]
        deltas = [g + e for g, e in zip(gradients, errors, strict=True)]
        turned = deltas if tall else [d.T for d in deltas]
        mean = sum(turned) / workers
        if t % 6 == 0:
            u = np.linalg.svd(mean)[2].T
            v = u[:, :2]
            sent = [d @ v @ v.T for d in turned]
            applied = mean @ v @ v.T
            q = v if tall else mean @ v
        elif t % 3 == 0:
            energies = 0
            for probe in range(2):
                z = gaussian(
                    6, ("w",), t, f"probe {probe}", mean.shape, torch.float64, torch.device("cpu")
                )[0].numpy()
                energies = energies + np.sum(mean @ u * z, axis=0) ** 2
            result = ssp_comp(u[:, np.argsort(-energies, kind="stable")[:2]], turned)
            sent, applied = result.sent, result.applied
            # P~ of the transpose
            q = result.basis if tall else np.linalg.qr(applied)[0][:, :2]
        else:
            result = ssp_comp(q, deltas)
            q, errors = result.basis, [d - s for d, s in zip(deltas, result.sent, strict=True)]
            sent, applied = None, result.applied
        if sent is not None:
            back = sent if tall else [s.T for s in sent]
            applied = applied if tall else applied.T
            errors = [d - s for d, s in zip(deltas, back, strict=True)]
        out = sim.reduce([{"w": torch.from_numpy(g.copy())} for g in gradients])["w"].numpy()
        np.testing.assert_allclose(out, applied, rtol=1e-8, atol=1e-8)
        for worker in range(workers):
            np.testing.assert_allclose(
                sim.error_memory(worker)["w"].numpy(), errors[worker], rtol=1e-8, atol=1e-8
            )


def test_greedy_restarts_with_stagger_find_their_basis_every_kth_time() -> None:
    """Each matrix in its own step of the period; the bytes of the broadcasts tell who
    found a basis.
    """
    tau, every = 4, 2
    shapes = {f"w{k}": (9, 6) for k in range(4)}
    scheme = PowerSGDPlus(
        1, restart_every=tau, restart="greedy", basis_every=every, basis=4, stagger=True
    )
    sim = simulation(scheme, shapes)
    found, restarts = [], []
    for t in range(1 + 4 * tau):
        sim.reduce(
            [{name: torch.from_numpy(gradient((9, 6), t, 0, k)) for k, name in enumerate(shapes)}]
        )
        found.append(sim.last_reports[0].bytes.get("broadcast", 0) // (8 * 6 * 4))
        restarts.append(sim.last_reports[0].restarts)
    assert restarts == [4] + [1] * (4 * tau)
    assert found == [4] + [0] * tau + [1] * tau + [0] * tau + [1] * tau


def test_a_warm_start_goes_on_from_the_restart() -> None:
    """After a restart by greedy choice the next step, on the same matrix, captures no
    less.
    """
    for shape in ((24, 16), (16, 24)):
        matrix = torch.from_numpy(spectrum_matrix(*shape, np.arange(1, 17) ** -0.5))
        sim = simulation(
            PowerSGDPlus(
                3, restart_every=4, restart="greedy", basis_every=2, basis=8, power_iterations=2
            ),
            {"w": shape},
        )
        other = torch.from_numpy(spectrum_matrix(*shape, np.arange(1, 17) ** -0.5, seed=9))
        energy = []
        for t in range(8):
            wanted = other if t == 0 else matrix
            energy.append(float(sim.reduce([{"w": wanted - sim.error_memory(0)["w"]}])["w"].norm()))
        assert all(
            later >= earlier * (1 - 1e-12) for earlier, later in itertools.pairwise(energy[1:4])
        )
        assert all(
            later >= earlier * (1 - 1e-12) for earlier, later in itertools.pairwise(energy[4:])
        )


# --- refusals --------------------------------------------------------------------------------------------------------


def test_by_name_from_json() -> None:
    section = {
        "compressor": "powersgd_plus",
        "rank": 2,
        "restart": "greedy",
        "basis": "full",
        "basis_every": 4,
    }
    assert Section.parse(section).make_compressor() == PowerSGDPlus(
        2, restart="greedy", basis="full", basis_every=4
    )
    assert Section.parse(
        {"compressor": "powersgd", "power_iterations": 2}
    ).make_compressor() == PowerSGD(power_iterations=2)


def test_matrices_in_blocks_of_rows() -> None:
    """All rules but the greedy one are those of whole matrices when these are held in
    blocks.
    """
    assert PowerSGD(2, power_iterations=2).row_blocks
    for restart in ("svd", "randomized", "random_projection"):
        assert PowerSGDPlus(2, restart=restart).row_blocks
    assert not PowerSGDPlus(2, restart="greedy").row_blocks


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PowerSGD(2, power_iterations=0), "power_iterations"),
        (lambda: PowerSGDPlus(2, power_iterations=True), "power_iterations"),
        (lambda: PowerSGDPlus(2, restart="greedi"), "'greedi'"),
        (lambda: PowerSGDPlus(2, basis_every=3), "basis_every=3"),
        (lambda: PowerSGDPlus(2, restart="randomized", basis=8), "basis=8"),
        (lambda: PowerSGDPlus(2, restart="random_projection", probes=2), "probes=2"),
        (lambda: PowerSGDPlus(2, restart="greedy", basis=1), "basis=1"),
        (lambda: PowerSGDPlus(2, restart="greedy", basis_every=0), "basis_every"),
        (lambda: PowerSGDPlus(2, restart="greedy", exact_restart=True), "exact_restart"),
        (
            lambda: PowerSGDPlus(2, restart="random_projection", consensus_restart=True),
            "consensus_restart",
        ),
    ],
)
def test_bad_options_are_refused_by_name(make: Callable[[], Compressor], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()
