"""PowerSGD: orthogonal projections, power iterations, large matrices, full rank."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lowrank_comm import PowerSGD
from tests.support.driver import simulation
from tests.support.reference import gradient, spectrum_matrix, ssp_comp
from tests.support.spectra import SPECTRA


def test_lemma_2_does_not_hold_for_a_subspace_of_the_past() -> None:
    """Negative control, and the reason for restarts: PowerSGD's single step from a bad
    basis captures less than r / n.
    """
    u, s, v = np.linalg.svd(spectrum_matrix(20, 12, SPECTRA["0.7^k"](12)))
    matrix, worst = torch.from_numpy((u[:, :12] * s) @ v), torch.from_numpy(v[-3:].T.copy())
    sim = simulation(PowerSGD(3), {"w": (20, 12)}, 1, initial_basis={"w": worst})
    applied = sim.reduce([{"w": matrix.clone()}])["w"]
    assert float(applied.norm() ** 2) < 0.1 * 3 / 12 * float(matrix.norm() ** 2)


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
