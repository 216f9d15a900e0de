"""PowerSGD: orthogonal projections, power iterations, large matrices, full rank."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from lowrank_comm import PowerSGD, PowerSGDPlus
from lowrank_comm.communication import Group
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.reduction.reducer import ParamInfo, Reducer
from tests.support.driver import Workers, dense, simulation
from tests.support.matrices import apply, drawn, every_compressor, low_rank, relative
from tests.support.reference import Reference, gradient, initial_basis, spectrum_matrix, ssp_comp
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


@every_compressor
def test_compression_is_an_orthogonal_projection(compressor: Compressor) -> None:
    """C(Delta) is orthogonal to Delta - C(Delta), hence Lemma 1: neither is longer than
    Delta.
    """
    by_hand = Workers(
        compressor, ("w",), 2, torch.from_numpy(initial_basis({"w": (8, 10)}, 2)["w"])[None]
    )
    for t in range(7):
        given = torch.stack([torch.from_numpy(gradient((8, 10), t, worker)) for worker in range(2)])
        delta = given.mean(0) + (torch.stack(by_hand.errors).mean(0)[0] if by_hand.errors else 0)
        applied = dense(by_hand.step([g[None] for g in given])[0].applied)[0]
        rest = delta - applied
        assert abs(float((applied * rest).sum())) < 1e-11 * float(delta.norm()) ** 2
        assert max(applied.norm(), rest.norm()) <= delta.norm() * (1 + 1e-12)


@every_compressor
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (5, 5), (1, 9), (9, 1), (6, 3, 2, 2), (1, 1)])
def test_full_rank_is_the_plain_mean(compressor: Compressor, shape: tuple[int, ...]) -> None:
    """With r >= min(m, n) (cut to it) every step gives the mean of the gradients, and
    no error is left.
    """
    settings = {key: value for key, value in vars(compressor).items() if key != "rank"}
    sim = simulation(type(compressor)(rank=50, **settings), {"w": shape}, 2)
    for t in range(8):
        gradients = [torch.from_numpy(gradient(shape, t, worker)) for worker in range(2)]
        applied = sim.reduce([{"w": g.clone()} for g in gradients])["w"]
        assert relative(applied, sum(gradients) / 2) < 1e-10
        mean_error = (sim.error_memory(0)["w"] + sim.error_memory(1)["w"]) / 2
        assert float(mean_error.norm()) < 1e-9
    assert applied.shape == torch.Size(shape)


LARGE = {
    "square": (401, 353),
    "twin": (401, 353),
    "wide": (37, 4001),
    "tall": (4001, 37),
    "filter": (128, 64, 5, 5),
}
"""Above the size from which matrices are worked on one by one, in blocks of rows; odd,
so that the last block is not full.
"""


@pytest.mark.parametrize("tau", [None, 2])
def test_large_matrices_follow_the_paper(tau: int | None) -> None:
    """Against the NumPy reference, two workers; the twin's gradient is missing on one
    worker in the second step (it counts as zero).
    """
    bases = initial_basis(LARGE, 3)
    compressor = PowerSGD(3) if tau is None else PowerSGDPlus(3, restart_every=tau)
    sim = simulation(
        compressor, LARGE, 2, initial_basis={name: torch.from_numpy(q) for name, q in bases.items()}
    )
    paper = {
        name: Reference(shape, 2, 3, basis=bases[name], restart_every=tau)
        for name, shape in LARGE.items()
    }
    for t in range(4):
        given: list[dict[str, Any]] = [drawn(t, worker, LARGE) for worker in range(2)]
        if t == 1:
            given[1]["twin"] = None
            given[0]["wide"] = given[0]["wide"].t().contiguous().t()
        applied = sim.reduce(given)
        for name, reference in paper.items():
            absent = torch.zeros(LARGE[name], dtype=torch.float64)
            expected = reference.step(
                [(absent if g[name] is None else g[name]).numpy() for g in given]
            )
            np.testing.assert_allclose(applied[name].numpy(), expected, rtol=1e-9, atol=1e-9)
            for worker in range(2):
                np.testing.assert_allclose(
                    sim.error_memory(worker)[name].numpy(),
                    reference.errors[worker],
                    rtol=1e-9,
                    atol=1e-9,
                )


def test_large_gradients_of_16_bits_and_with_a_loss_scale() -> None:
    """bfloat16 gradients give the error memory that the same numbers in float32 give,
    also with a scale in them.
    """
    cpu = torch.device("cpu")
    of_16_bits, of_32_bits = (
        Reducer([ParamInfo("w", (401, 353), dtype, cpu)], PowerSGDPlus(3, restart_every=2), Group())
        for dtype in (torch.bfloat16, torch.float32)
    )
    for t in range(4):
        narrow = torch.as_tensor(gradient((401, 353), t, 0)).to(torch.bfloat16)
        wide = narrow.float()
        assert of_16_bits.reduce([narrow.mul_(64)], scale=64.0).applied
        assert of_32_bits.reduce([wide]).applied
        of_16_bits.commit()
        of_32_bits.commit()
        assert (
            relative(of_16_bits.state.error_memory()["w"], of_32_bits.state.error_memory()["w"])
            < 1e-5
        )
        assert relative(narrow.float() / 64, wide) < 1e-2


@every_compressor
@pytest.mark.parametrize("first", [0, 4], ids=["from the start", "after some steps"])
def test_zero_gradients_then_progress(compressor: Compressor, first: int) -> None:
    """Zero gradients leave everything zero; a gradient of rank 2 that follows goes
    through whole, at once.
    """
    sim = simulation(compressor, {"w": (14, 9)})
    for t in range(first):
        apply(sim, low_rank(14, 9, 5, t))
        cleared = t % 3 == 0 and getattr(compressor, "exact_restart", False)
        assert cleared or float(sim.error_memory(0)["w"].norm()) > 1e-1
    # what error there is goes out first
    for _ in range(40):
        last = apply(sim, torch.zeros(14, 9, dtype=torch.float64))
    assert float(last.norm()) < 1e-9
    assert float(sim.error_memory(0)["w"].norm()) < 1e-9
    for t in range(3):
        g = low_rank(14, 9, 2, 100 + t)
        assert relative(apply(sim, g), g) < 1e-9


@every_compressor
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_gradients_of_lower_rank_than_r(compressor: Compressor, dtype: torch.dtype) -> None:
    """Rank 1 under r = 2: P is rank-deficient, its filling is arbitrary, the result
    exact; then rank 2 goes through as well.
    """
    sim = simulation(compressor, {"w": (14, 9)}, dtype=dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    for t in range(5):
        g = low_rank(14, 9, 1, t, dtype)
        assert relative(apply(sim, g), g) < tolerance
    g = low_rank(14, 9, 2, 50, dtype)
    assert relative(apply(sim, g), g) < 10 * tolerance


def test_the_first_basis_does_not_depend_on_the_world_size() -> None:
    """Equal gradients on 1 and on 4 workers: the same mean, hence the same result if
    Q_{-1} is the same.
    """
    g = torch.from_numpy(gradient((12, 9), 0, 0))
    alone = simulation(PowerSGD(2), {"w": (12, 9)}, 1, seed=5).reduce([{"w": g.clone()}])["w"]
    four = simulation(PowerSGD(2), {"w": (12, 9)}, 4, seed=5).reduce(
        [{"w": g.clone()} for _ in range(4)]
    )["w"]
    torch.testing.assert_close(four, alone, rtol=1e-12, atol=1e-12)
