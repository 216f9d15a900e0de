"""ACP: half a power iteration a step, and its restarts."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

from lowrank_comm import Acp, ConfigError, PowerSGD, PowerSGDPlus
from lowrank_comm.compressors.base import Compressor
from tests.support import checks
from tests.support.checks import Driven
from tests.support.driver import dense, elements_at, simulation
from tests.support.gloo import GlooPool
from tests.support.reference import gradient, spectrum_matrix
from tests.support.spectra import SPECTRA, captured

SCHEMES = [Acp(2), Acp(2, restart_every=4), Acp(2, restart_every=3, restart="svd")]


@pytest.mark.parametrize("check", checks.LINEAR, ids=lambda check: check.__name__)
@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[2]], ids=repr)
def test_invariants(scheme: Compressor, check: Callable[[Compressor], None]) -> None:
    check(scheme)


@pytest.mark.parametrize("scheme", [SCHEMES[0], SCHEMES[1]], ids=repr)
def test_gloo_equals_simulation(gloo: GlooPool, scheme: Compressor) -> None:
    checks.processes_equal_simulation(gloo, scheme)


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
def test_bytes_over_two_periods(scheme: Compressor) -> None:
    checks.bytes_are_as_said(scheme, 8)


def test_one_factor_and_one_collective_a_step() -> None:
    """r m and r n in turn, half of PowerSGD's r (m + n) on average; restarts cost what
    PowerSGD+'s cost.
    """
    sim = simulation(Acp(2), {"w": (30, 20)}, 2)
    sent = []
    for t in range(6):
        sim.reduce([{"w": torch.from_numpy(gradient((30, 20), t, worker))} for worker in range(2)])
        sent.append(sim.last_reports[0].bytes["factors"])
        assert sim.last_reports[0].collectives == 1
    assert sent == [8 * 2 * 30, 8 * 2 * 20] * 3
    assert Acp(2).elements(30, 20, 2) * 2 == PowerSGD(2).elements(30, 20, 2)
    # 3.5, rounded up
    assert Acp(1).elements(4, 3, 1) == 4
    # Q is the whole space
    assert Acp(3).elements(30, 3, 3) == elements_at(Acp(3), 30, 3, 3, 1, False) == 3 * 30
    for restart in ("svd", "randomized"):
        one = Acp(2, restart_every=5, restart=restart)
        other = PowerSGDPlus(2, restart_every=5, restart=restart)
        assert one.restart_elements(30, 20, 2) == other.restart_elements(30, 20, 2)


# --- against the algorithm in NumPy ---


class Reference:
    """Algorithm of the module's text for one matrix, from a given Q; tau = None, or SVD
    restarts.
    """

    def __init__(
        self, shape: tuple[int, int], workers: int, basis: np.ndarray, tau: int | None
    ) -> None:
        self.q, self.p, self.tau, self.k = basis, np.zeros(0), tau, 0 if tau is None else -1
        self.errors = [np.zeros(shape) for _ in range(workers)]

    def step(self, gradients: list[np.ndarray]) -> np.ndarray:
        deltas = [g + e for g, e in zip(gradients, self.errors, strict=True)]
        mean = sum(deltas) / len(deltas)
        self.k += 1
        if self.tau is not None and self.k % self.tau == 0:
            self.k = 0
            self.p = np.linalg.svd(mean)[0][:, : self.q.shape[1]]
            self.q = mean.T @ self.p
            sent = [self.p @ self.p.T @ d for d in deltas]
        elif self.k % 2 == 1:
            q = np.linalg.qr(self.q)[0]
            self.p = mean @ q
            sent = [d @ q @ q.T for d in deltas]
        else:
            p = np.linalg.qr(self.p)[0]
            self.q = mean.T @ p
            sent = [p @ p.T @ d for d in deltas]
        self.errors = [d - s for d, s in zip(deltas, sent, strict=True)]
        return sum(sent) / len(sent)


@pytest.mark.parametrize("tau", [None, 4, 5])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
@pytest.mark.parametrize("workers", [1, 3])
def test_fifteen_steps_as_written(workers: int, shape: tuple[int, int], tau: int | None) -> None:
    """From the same Q; with periods of even and of odd length, after which the next
    step uses the fresh Q.
    """
    basis = np.random.default_rng(3).standard_normal((shape[1], 2))
    scheme = Acp(2) if tau is None else Acp(2, restart_every=tau, restart="svd")
    sim = simulation(scheme, {"w": shape}, workers, initial_basis={"w": torch.from_numpy(basis)})
    paper = Reference(shape, workers, basis, tau)
    for t in range(15):
        gradients = [gradient(shape, t, worker) for worker in range(workers)]
        applied = sim.reduce([{"w": torch.from_numpy(g.copy())} for g in gradients])["w"]
        np.testing.assert_allclose(applied.numpy(), paper.step(gradients), rtol=1e-9, atol=1e-9)
        for worker in range(workers):
            np.testing.assert_allclose(
                sim.error_memory(worker)["w"].numpy(), paper.errors[worker], rtol=1e-9, atol=1e-9
            )


def test_the_transpose_is_the_other_phase() -> None:
    """Of the transposed gradients, a step later: P and Q change places."""
    driven, turned = Driven(Acp(2), (9, 6), 2), Driven(Acp(2), (6, 9), 2)
    first = [torch.from_numpy(gradient((9, 6), 0, worker)) for worker in range(2)]
    driven.step(first)
    state = driven.states[0]
    # its next step, t = 0, uses Q; the other one's, t = 1, uses P
    turned.states = [{"P": state["Q"], "Q": state["P"]}] * 2
    turned.errors = [error.mT.clone() for error in driven.errors]
    for t in range(1, 7):
        gradients = [torch.from_numpy(gradient((9, 6), t, worker)) for worker in range(2)]
        one = dense(driven.step(gradients)[0].applied)
        other = dense(turned.step([g.T for g in gradients])[0].applied)
        torch.testing.assert_close(other.mT, one, rtol=1e-10, atol=1e-10)


def test_compression_is_an_orthogonal_projection() -> None:
    """Lemma 1, for both phases and at restarts."""
    for scheme in SCHEMES:
        driven = Driven(scheme, (8, 10), 2)
        for t in range(8):
            results = driven.step(
                [torch.from_numpy(gradient((8, 10), t, worker)) for worker in range(2)]
            )
            mean, applied = torch.stack(driven.deltas).mean(0), dense(results[0].applied)
            assert abs(float((applied * (mean - applied)).sum())) < 1e-10 * float(mean.norm()) ** 2


# --- what it captures ---


def test_captured_energy_on_a_matrix_that_does_not_change() -> None:
    """30 x 20, spectrum 1/k, r = 2: the first step's random subspace captures r / n in
    expectation, the next is the single-step iteration's; from then on each half
    iteration captures no less than the last one, and after some steps what the singular
    vectors would, .783.
    """
    matrix = torch.from_numpy(spectrum_matrix(30, 20, 1.0 / np.arange(1, 21)))
    draws = [f"draw{k}" for k in range(60)]
    sim = simulation(Acp(2), dict.fromkeys(draws, (30, 20)))
    energy = []
    for _ in range(30):
        errors = sim.error_memory(0)
        out = sim.reduce([{name: matrix - errors[name] for name in draws}])
        energy.append([float((out[name].norm() / matrix.norm()) ** 2) for name in draws])
    steps = np.array(energy)
    assert all((later >= earlier - 1e-12).all() for earlier, later in itertools.pairwise(steps))
    first = steps[0]
    assert first.mean() == pytest.approx(2 / 20, abs=4 * first.std() / len(draws) ** 0.5)
    single = captured(PowerSGD(2), matrix.numpy(), len(draws))
    assert steps[1].mean() == pytest.approx(
        single.mean(), abs=4 * (steps[1].std() + single.std()) / len(draws) ** 0.5
    )
    assert steps[-1].min() > 0.78


@pytest.mark.parametrize("restart", ["randomized", "svd"])
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_lemma_2_at_restarts(spectrum: str, restart: str) -> None:
    """The restart captures r / min(m, n) at least in expectation; 200 draws, 3 standard
    errors. Without it, from a bad basis, the step does not (control).
    """
    matrix = spectrum_matrix(20, 12, SPECTRA[spectrum](12))
    share = captured(Acp(3, restart_every=5, restart=restart), matrix, 200)
    assert share.mean() + 3 * share.std() / 200**0.5 >= 3 / 12 - 1e-12
    if spectrum == "0.7^k":
        worst = torch.from_numpy(np.linalg.svd(matrix)[2][-3:].T.copy())
        sim = simulation(Acp(3), {"w": (20, 12)}, initial_basis={"w": worst})
        applied = sim.reduce([{"w": torch.from_numpy(matrix)}])["w"]
        assert float(applied.norm()) ** 2 < 0.1 * 3 / 12 * np.linalg.norm(matrix) ** 2


def test_a_restart_leaves_the_trap() -> None:
    """A basis of singular vectors of a matrix is where power iteration stands still; a
    gradient of other directions is then never seen. A restart sees it.
    """
    u, _, vt = np.linalg.svd(spectrum_matrix(12, 8, np.ones(8)))
    seen, other = (torch.from_numpy(np.outer(u[:, k], vt[k])) for k in (0, 1))
    for scheme, escapes in ((Acp(1), False), (Acp(1, restart_every=2), True)):
        sim = simulation(
            scheme, {"w": (12, 8)}, initial_basis={"w": torch.from_numpy(vt[:1].T.copy())}
        )
        total = torch.zeros(12, 8, dtype=torch.float64)
        for t in range(6):
            total += sim.reduce([{"w": (seen + (other if t else 0)).clone()}])["w"]
        assert (float((total * other).sum()) > 1) == escapes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"restart_every": 0}, "restart_every"),
        ({"restart_every": 2.0}, "restart_every"),
        ({"restart": "greedy"}, "'greedy'"),
        ({"restart": "svd"}, "no effect without restart_every"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Acp(4, **options)


def test_matrices_in_blocks_of_rows_are_refused() -> None:
    assert not Acp(2).row_blocks
