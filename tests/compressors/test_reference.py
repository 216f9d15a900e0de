"""The library over real gloo processes against the paper's Algorithms 1 and 2 in NumPy
(`reference.py`), number by number.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lowrank_comm import CompressedOptimizer, PowerSGD, PowerSGDPlus
from tests.support.driver import recorded_step
from tests.support.gloo import GlooPool
from tests.support.reference import Reference, average, gradients, initial_basis, ssp_comp, svd_comp

pytestmark = pytest.mark.usefixtures("both_paths")

SHAPES = {
    "tall": (12, 7),
    "tall_too": (12, 7),
    "wide": (7, 12),
    "square": (9, 9),
    "thin": (30, 3),
    "filter": (6, 3, 2, 2),
}
STEPS = 30
RATE, MOMENTUM = 0.05, 0.9


def compressor(rank: int, tau: int | None) -> PowerSGD:
    return PowerSGD(rank) if tau is None else PowerSGDPlus(rank, restart_every=tau)


def train(
    rank: int, compression_rank: int, tau: int | None
) -> list[dict[str, dict[str, np.ndarray]]]:
    """30 steps of momentum SGD: at each step the averaged compressed gradient, this
    worker's error memory, and the parameters.
    """
    parameters = {
        name: torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        for name, shape in SHAPES.items()
    }
    optimizer = CompressedOptimizer(
        torch.optim.SGD(parameters.items(), lr=RATE, momentum=MOMENTUM),
        compressor=compressor(compression_rank, tau),
        min_compression_rate=0,
        initial_basis={
            name: torch.from_numpy(q) for name, q in initial_basis(SHAPES, compression_rank).items()
        },
    )
    history = []
    for t in range(STEPS):
        for name, gradient in gradients(SHAPES, t, rank).items():
            parameters[name].grad = torch.from_numpy(gradient)
        history.append(recorded_step(optimizer, parameters))
    return history


@pytest.mark.parametrize("tau", [None, 1, 5])
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_gloo_workers_follow_the_paper(
    gloo: GlooPool, workers: int, rank: int, tau: int | None
) -> None:
    histories = gloo.run(train, workers, rank, tau)
    bases = initial_basis(SHAPES, rank)
    for name, shape in SHAPES.items():
        paper = Reference(shape, workers, rank, basis=bases[name], restart_every=tau)
        momentum, parameter = np.zeros(shape), np.zeros(shape)
        for t in range(STEPS):
            applied = paper.step([gradients(SHAPES, t, worker)[name] for worker in range(workers)])
            # (7c)
            momentum = MOMENTUM * momentum + applied
            parameter = parameter - RATE * momentum
            for worker, history in enumerate(histories):
                where = f"{name}, step {t}, worker {worker}"
                np.testing.assert_allclose(
                    history[t]["applied"][name], applied, rtol=1e-9, atol=1e-9, err_msg=where
                )
                np.testing.assert_allclose(
                    history[t]["error"][name],
                    paper.errors[worker],
                    rtol=1e-9,
                    atol=1e-9,
                    err_msg=where,
                )
                np.testing.assert_allclose(
                    history[t]["parameter"][name], parameter, rtol=1e-9, atol=1e-9, err_msg=where
                )


def test_the_basis_given_is_the_one_used(gloo: GlooPool) -> None:
    """A negative control of the comparison above: from another Q_{-1}, PowerSGD takes
    another way.
    """
    history = gloo.run(train, 1, 2, None)[0]
    other = Reference(SHAPES["tall"], 1, 2, basis=initial_basis(SHAPES, 2, seed=1)["tall"])
    applied = other.step([gradients(SHAPES, 0, 0)["tall"]])
    assert np.abs(history[0]["applied"]["tall"] - applied).max() > 1e-2


def test_reference_on_the_papers_first_step() -> None:
    """The reference itself against Claim 1 of the paper's appendix, computed by hand:
    Delta = sigma B gives Q_0 = 2 sigma C, all applied.
    """
    sigma = 3.0
    b = np.ones((2, 2))
    result = ssp_comp(np.array([[0.3], [1.1]]), [sigma * b, sigma * b])
    np.testing.assert_allclose(
        np.abs(result.basis), 2 * sigma * np.full((2, 1), np.sqrt(0.5)), rtol=1e-14
    )
    np.testing.assert_allclose(result.applied, sigma * b, rtol=1e-14)


def test_reference_svd_is_the_best_approximation() -> None:
    """The reference itself against Eckart-Young: what SVD-Comp leaves of the mean is
    the energy of the singular values beyond r.
    """
    deltas = [gradients(SHAPES, 0, worker)["tall"] for worker in range(3)]
    result = svd_comp(2, deltas)
    left = np.sum((average(deltas) - result.applied) ** 2)
    np.testing.assert_allclose(left, np.sum(np.linalg.svd(average(deltas))[1][2:] ** 2), rtol=1e-12)
    np.testing.assert_allclose(average(result.sent), result.applied, atol=1e-13)
