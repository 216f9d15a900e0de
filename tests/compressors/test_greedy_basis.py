"""Restarts that choose from a basis found now and then: the choice, its contraction,
the period of the basis.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lowrank_comm import PowerSGDPlus
from lowrank_comm.numerics.randomness import gaussian
from tests.support import checks
from tests.support.driver import simulation
from tests.support.reference import gradient, spectrum_matrix, ssp_comp


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
