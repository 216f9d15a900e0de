"""GreedyLore: the refresh, the choice of columns, what the choice captures, and the
capped basis.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from lowrank_comm import ConfigError, GreedyLore
from lowrank_comm.compressors.base import Compressor, Context, Delta
from lowrank_comm.compressors.greedy_basis import find_basis, greedy_choice
from lowrank_comm.compressors.requests import Mean
from lowrank_comm.config import Section
from lowrank_comm.numerics.randomness import gaussian
from tests.support import checks
from tests.support.checks import Driven, relative
from tests.support.driver import dense, simulation
from tests.support.gloo import GlooPool
from tests.support.reference import gradient, spectrum_matrix

SCHEMES = [
    GreedyLore(2, restart_every=4),
    GreedyLore(2, restart_every=4, basis="full", probes=3),
    GreedyLore(2, restart_every=4, basis=4),
    GreedyLore(2, restart_every=4, basis=4, explore=2),
    GreedyLore(2, restart_every=3, stagger=True),
]


@pytest.mark.parametrize("check", checks.LINEAR, ids=lambda check: check.__name__)
@pytest.mark.parametrize("scheme", [SCHEMES[1], SCHEMES[3]], ids=repr)
def test_invariants(scheme: GreedyLore, check: Callable[[Compressor], None]) -> None:
    # a basis holds at least r columns
    wider = check is checks.full_rank_is_dense and isinstance(scheme.basis, int)
    check(replace(scheme, basis=14) if wider else scheme)


def test_staggered_refreshes_lose_nothing() -> None:
    checks.nothing_is_lost_over_a_run(SCHEMES[4])


@pytest.mark.parametrize("scheme", [SCHEMES[1], SCHEMES[3]], ids=repr)
def test_gloo_equals_simulation(gloo: GlooPool, scheme: Compressor) -> None:
    checks.processes_equal_simulation(gloo, scheme)


@pytest.mark.parametrize("scheme", SCHEMES[:4], ids=repr)
def test_bytes_over_two_periods(scheme: Compressor) -> None:
    checks.bytes_are_as_said(scheme, 8)


def test_the_formulas_of_the_bytes() -> None:
    """r l + probes s; at a refresh m n, and the basis itself, which one worker hands to
    the others.
    """
    whole, capped = GreedyLore(4, basis="full", probes=2), GreedyLore(4, basis=20, explore=3)
    for m, n in ((100, 50), (50, 100)):
        assert whole.elements(m, n, 4) == 4 * 100 + 2 * 50
        assert whole.restart_elements(m, n, 4) == 100 * 50 + 50 * 50
        assert capped.elements(m, n, 4) == 4 * 100 + 20
        assert capped.restart_elements(m, n, 4) == 100 * 50 + 50 * 17
    # the default caps the basis at 32 r columns
    assert GreedyLore(4).elements(1000, 500, 4) == 4 * 1000 + 32 * 4
    # nothing to choose, nothing to ask
    assert GreedyLore(4, basis=4).elements(100, 50, 4) == 4 * 100


# --- against the algorithm in NumPy ---


class Reference:
    """GreedyLore of one matrix with a whole basis, in NumPy. The probes are the
    library's draws.
    """

    def __init__(
        self, shape: tuple[int, int], workers: int, rank: int, tau: int, probes: int, seed: int
    ) -> None:
        self.shape = shape
        self.rank = rank
        self.tau = tau
        self.probes = probes
        self.seed = seed
        self.t = 0
        self.errors = [np.zeros(shape) for _ in range(workers)]
        self.basis = np.zeros(0)

    def step(self, gradients: list[np.ndarray]) -> np.ndarray:
        deltas = [g + e for g, e in zip(gradients, self.errors, strict=True)]
        tall = [d if d.shape[0] >= d.shape[1] else d.T for d in deltas]
        mean = sum(tall) / len(tall)
        if self.t % self.tau == 0:
            self.basis = np.linalg.svd(mean)[2].T
            sent = tall
        else:
            energies = np.zeros(mean.shape[1])
            for probe in range(self.probes):
                z = gaussian(
                    self.seed,
                    ("w",),
                    self.t,
                    f"probe {probe}",
                    mean.shape,
                    torch.float64,
                    torch.device("cpu"),
                )[0]
                per_worker = [np.sum((d @ self.basis) * z.numpy(), axis=0) for d in tall]
                energies += (sum(per_worker) / len(per_worker)) ** 2
            v = self.basis[:, np.argsort(-energies, kind="stable")[: self.rank]]
            sent = [d @ v @ v.T for d in tall]
        self.t += 1
        back = [s if s.shape == self.shape else s.T for s in sent]
        self.errors = [d - s for d, s in zip(deltas, back, strict=True)]
        return sum(back) / len(back)


@pytest.mark.parametrize("probes", [1, 3])
@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
@pytest.mark.parametrize("workers", [1, 3])
def test_fifteen_steps_as_written(workers: int, shape: tuple[int, int], probes: int) -> None:
    scheme = GreedyLore(2, restart_every=4, basis="full", probes=probes)
    sim = simulation(scheme, {"w": shape}, workers, seed=5)
    paper = Reference(shape, workers, 2, 4, probes, 5)
    signs = np.sign(np.random.default_rng(0).standard_normal((15, 1, 1)))
    for t in range(15):
        gradients = [gradient(shape, t, worker) * signs[t] for worker in range(workers)]
        applied = sim.reduce([{"w": torch.from_numpy(g.copy())} for g in gradients])["w"]
        np.testing.assert_allclose(applied.numpy(), paper.step(gradients), rtol=1e-9, atol=1e-9)
        for worker in range(workers):
            np.testing.assert_allclose(
                sim.error_memory(worker)["w"].numpy(), paper.errors[worker], rtol=1e-9, atol=1e-9
            )


@pytest.mark.parametrize("scheme", SCHEMES[:4], ids=repr)
def test_the_transpose_gives_the_transpose(scheme: Compressor) -> None:
    """Of a matrix with m > n; a square one keeps its basis on the columns either way.
    The draws are of the short and the long side, so they are the same.
    """
    tall, wide = simulation(scheme, {"w": (13, 7)}, 2), simulation(scheme, {"w": (7, 13)}, 2)
    for t in range(9):
        gradients = [torch.from_numpy(gradient((13, 7), t, worker)) for worker in range(2)]
        one = tall.reduce([{"w": g.clone()} for g in gradients])["w"]
        other = wide.reduce([{"w": g.T.contiguous()} for g in gradients])["w"]
        torch.testing.assert_close(other.T, one, rtol=1e-10, atol=1e-10)


# --- refresh ---


def test_a_refresh_applies_gradient_and_error_and_clears_the_error() -> None:
    """Control: the mean gradient alone, with a memory that is cleared, would lose what
    the memory held.
    """
    shape, tau = (11, 8), 4
    sim = simulation(GreedyLore(2, restart_every=tau, basis=4), {"w": shape}, 3)
    given = applied = torch.zeros(shape, dtype=torch.float64)
    for t in range(13):
        gradients = [torch.from_numpy(gradient(shape, t, worker)) for worker in range(3)]
        held = sum(sim.error_memory(worker)["w"] for worker in range(3)) / 3
        mean = sum(gradients) / 3
        given = given + mean
        out = sim.reduce([{"w": g.clone()} for g in gradients])["w"]
        applied = applied + out
        errors = [sim.error_memory(worker)["w"] for worker in range(3)]
        if t % tau == 0:
            torch.testing.assert_close(out, mean + held, rtol=1e-12, atol=1e-12)
            assert all(not error.any() for error in errors)
            assert relative(applied, given) < 1e-12
            assert t == 0 or relative(mean, mean + held) > 0.3
        else:
            assert all(float(error.norm()) > 1e-2 for error in errors)


def test_error_is_bounded_by_the_period_whatever_the_basis_misses() -> None:
    """||mean e|| <= (steps since the refresh) G, with a basis that sees nothing of what
    comes after the refresh.
    """
    tau, rows = 6, torch.zeros(12, 8, dtype=torch.float64)
    rows[:, 0] = 1.0
    other = torch.zeros(12, 8, dtype=torch.float64)
    other[:, 5] = 1.0
    sim = simulation(GreedyLore(1, restart_every=tau, basis=1), {"w": (12, 8)})
    for t in range(3 * tau):
        sim.reduce([{"w": (rows if t == 0 else other).clone()}])
        error = float(sim.error_memory(0)["w"].norm())
        assert error <= (t % tau) * float(other.norm()) + 1e-9
        # nothing of it was seen
        assert t >= tau or error == pytest.approx(t * float(other.norm()), abs=1e-9)


# --- what the choice captures ---

M, N, RANK, WORKERS, DRAWS = 64, 32, 4, 4, 400


def noisy_workers(seed: int, noise: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Four workers' matrices with singular values 1/k in the mean and noise of their
    own, whose mean is as large; and the right singular vectors of the mean without it.
    """
    generator = np.random.default_rng(seed)
    mean = spectrum_matrix(M, N, 1.0 / np.arange(1, N + 1), seed)
    own = generator.standard_normal((WORKERS, M, N))
    own *= noise * np.linalg.norm(mean) / np.sqrt(M * N)
    return torch.from_numpy(mean + own), torch.from_numpy(np.linalg.svd(mean)[2].T.copy())


def chosen(
    parts: torch.Tensor, u: torch.Tensor, probes: int, names: tuple[str, ...]
) -> torch.Tensor:
    """V of `greedy_choice` for each name, by hand: its one request answered with the
    mean of the workers' scores.
    """
    context = Context(names, 1, 0, RANK)
    basis = u.expand(len(names), -1, -1)
    runs = [
        greedy_choice(Delta(part.expand(len(names), -1, -1)), basis, context, probes)
        for part in parts
    ]
    asked = [next(run) for run in runs]
    assert all(isinstance(request, Mean) for request in asked)
    mean = torch.stack([request.tensor for request in asked]).mean(0)
    with pytest.raises(StopIteration) as end:
        runs[0].send((mean, asked[0].tensor))
    return end.value.value


def energy(matrix: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Share of the energy of a matrix that V V^T leaves. v: (B, n, r)."""
    return (matrix @ v).square().sum((1, 2)) / matrix.square().sum()


def test_signed_scores_averaged_before_squaring_find_the_large_columns() -> None:
    """Captured energy: the exact top-r of the columns, four probes, one probe, one
    probe with squares averaged (each worker's noise is then taken for signal), random
    columns: about .50, .45, .34, .31, .125. Each is less than the one before it by more
    than 4 standard errors of the difference; one probe is the first of the four and of
    the control.
    """
    parts, u = noisy_workers(1)
    mean = parts.mean(0)
    names = tuple(f"draw {k}" for k in range(DRAWS))
    columns = (mean @ u).square().sum(0)
    best = energy(mean, u[:, columns.argsort(descending=True)[:RANK]][None])[0]
    one, four = (energy(mean, chosen(parts, u, probes, names)) for probes in (1, 4))
    z = gaussian(0, names, 1, "probe 0", (M, N), torch.float64, torch.device("cpu"))
    # negative control
    squares = torch.stack([((part @ u) * z).sum(1).square() for part in parts]).mean(0)
    wrong = energy(mean, u.T[squares.argsort(descending=True)[:, :RANK]].mT)
    generator = torch.Generator().manual_seed(0)
    anything = energy(
        mean, torch.stack([u[:, torch.randperm(N, generator=generator)[:RANK]] for _ in names])
    )
    ordered = [best.expand(DRAWS), four, one, wrong, anything]
    for better, worse in itertools.pairwise(ordered):
        difference = better - worse
        assert float(difference.mean()) > 4 * float(difference.std()) / DRAWS**0.5
    for measured, wanted in zip(ordered, (0.504, 0.453, 0.338, 0.311, 0.125), strict=True):
        assert float(measured.mean()) == pytest.approx(wanted, abs=0.03)
    assert float(anything.mean()) == pytest.approx(
        RANK / N, abs=4 * float(anything.std()) / DRAWS**0.5
    )


def test_expected_square_of_the_score_is_the_columns_energy() -> None:
    parts, u = noisy_workers(2)
    names = tuple(f"draw {k}" for k in range(2000))
    z = gaussian(0, names, 1, "probe 0", (M, N), torch.float64, torch.device("cpu"))
    squared = torch.stack([((part @ u) * z).sum(1) for part in parts]).mean(0).square()
    wanted = (parts.mean(0) @ u).square().sum(0)
    error = squared.std(0) / len(names) ** 0.5
    # of 32 columns
    assert float(((squared.mean(0) - wanted) / error).abs().max()) < 4.5


@pytest.mark.parametrize("spectrum", ["flat", "1/k", "one"])
def test_contraction_at_every_step_with_a_basis_that_never_saw_the_gradient(spectrum: str) -> None:
    """delta >= r / s in expectation, with equality for a flat spectrum; 2 000 draws, 3
    standard errors.
    """
    m, n, rank = 12, 8, 2
    values = {
        "flat": np.ones(n),
        "1/k": 1.0 / np.arange(1, n + 1),
        "one": np.array([1.0] + [1e-3] * (n - 1)),
    }[spectrum]
    matrix = torch.from_numpy(spectrum_matrix(m, n, values, 3))
    basis = torch.from_numpy(np.linalg.qr(np.random.default_rng(4).standard_normal((n, n)))[0])
    names = tuple(f"draw {k}" for k in range(2000))
    context = Context(names, 1, 0, rank)
    run = greedy_choice(
        Delta(matrix.expand(len(names), -1, -1)), basis.expand(len(names), -1, -1), context, 1
    )
    request = next(run)
    with pytest.raises(StopIteration) as end:
        run.send((request.tensor, request.tensor))
    captured = energy(matrix, end.value.value)
    error = float(captured.std()) / len(names) ** 0.5
    assert float(captured.mean()) >= rank / n - 3 * error
    if spectrum == "flat":
        assert float(captured.mean()) == pytest.approx(rank / n, abs=1e-12)
    else:
        assert float(captured.mean()) > rank / n + 3 * error


def test_ties_go_to_the_lower_index() -> None:
    """Scores of a zero matrix are all zero: the first r columns, so that workers need
    not agree on anything.
    """
    basis = torch.eye(6, dtype=torch.float64)[None]
    run = greedy_choice(
        Delta(torch.zeros(1, 9, 6, dtype=torch.float64)), basis, Context(("w",), 1, 0, 3), 1
    )
    request = next(run)
    with pytest.raises(StopIteration) as end:
        run.send((request.tensor, request.tensor))
    assert torch.equal(end.value.value, basis[..., :3])


# --- the basis ---


def basis_from(d: torch.Tensor, columns: int) -> torch.Tensor:
    run = find_basis(d, Context(tuple(f"w{k}" for k in range(len(d))), 0, 0, 2), columns)
    request = next(run)
    with pytest.raises(StopIteration) as end:
        run.send(request.of(request.matrices, list(range(len(d)))))
    return end.value.value


@pytest.mark.parametrize("shape", [(90, 60), (60, 90)])
def test_a_capped_basis_is_orthonormal_and_close_to_the_singular_vectors(
    shape: tuple[int, int],
) -> None:
    """Energy that 12 columns span: next to that of the 12 leading singular vectors, for
    a spectrum that decays; a random basis of 12 columns spans a fifth (control).
    """
    short = (lambda a: a) if shape[0] >= shape[1] else (lambda a: a.T)
    values = 1.0 / np.arange(1, 61)
    matrix = torch.from_numpy(spectrum_matrix(*shape, values))
    u = basis_from(matrix[None], 12)
    torch.testing.assert_close(
        u[0].T @ u[0], torch.eye(12, dtype=torch.float64), rtol=0, atol=1e-12
    )
    best = (values[:12] ** 2).sum() / (values**2).sum()
    spanned = float(energy(short(matrix), u))
    assert best - 0.005 < spanned <= best + 1e-12
    # in descending order, the first ones the singular vectors themselves
    each = (short(matrix) @ u[0]).norm(dim=0)
    np.testing.assert_allclose(each[:4], values[:4], rtol=1e-2)
    random = torch.from_numpy(np.linalg.qr(np.random.default_rng(0).standard_normal((60, 12)))[0])
    assert float(energy(short(matrix), random[None])) < 0.5 * best


def test_a_basis_of_nothing_is_orthonormal_too() -> None:
    """D = 0, and D of rank 1: the range finder's dead columns are replaced."""
    d = torch.zeros(2, 70, 50, dtype=torch.float64)
    d[1, 3, 4] = 1.0
    u = basis_from(d, 10)
    for one in u:
        torch.testing.assert_close(
            one.T @ one, torch.eye(10, dtype=torch.float64), rtol=0, atol=1e-12
        )
    assert float(energy(d[1], u[1:])) == pytest.approx(1.0)


def test_what_the_cap_costs_and_exploring_brings() -> None:
    """A gradient that turns to where the basis is blind: the cap sends nothing of it,
    the exploring cap at least (r / c) k / (s - c + k) in expectation, the whole basis
    at least r / s.
    """
    m, n, rank, columns, explore = 10, 12, 1, 4, 2
    first, turned = torch.eye(m, n, dtype=torch.float64), torch.zeros(m, n, dtype=torch.float64)
    # the short side is that of the rows, and the basis spans the first four
    first[4:] = 0
    turned[7] = 1.0
    names = [f"w{k}" for k in range(600)]

    def second_step(scheme: Compressor) -> np.ndarray:
        sim = simulation(scheme, dict.fromkeys(names, (m, n)))
        sim.reduce([{name: first.clone() for name in names}])
        out = sim.reduce([{name: turned.clone() for name in names}])
        return np.array([float((out[name].norm() / turned.norm()) ** 2) for name in names])

    blind = second_step(GreedyLore(rank, basis=columns))
    exploring = second_step(GreedyLore(rank, basis=columns, explore=explore))
    whole = second_step(GreedyLore(rank, basis="full"))
    assert blind.max() < 1e-20
    bound = rank / columns * explore / (m - columns + explore)
    assert exploring.mean() - 3 * exploring.std() / len(names) ** 0.5 > bound
    assert whole.mean() + 3 * whole.std() / len(names) ** 0.5 >= rank / m


def test_a_parameter_without_refresh_so_far_is_served() -> None:
    """The state before any refresh is a basis of coordinates, for parameters that are
    added between two refreshes.
    """
    for shape in ((9, 6), (6, 9)):
        driven = Driven(GreedyLore(2, basis=5), shape, 2)
        u = driven.states[0]["U"][0]
        torch.testing.assert_close(u.T @ u, torch.eye(5, dtype=torch.float64))
        driven.t = 1
        results = driven.step([torch.from_numpy(gradient(shape, 0, worker)) for worker in range(2)])
        assert 0 < float(dense(results[0].applied).norm()) < float(driven.deltas[0].norm())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"restart_every": 0}, "restart_every"),
        ({"probes": 0}, "probes"),
        ({"probes": True}, "probes"),
        ({"basis": "half"}, "'half'"),
        ({"basis": 3}, "basis=3"),
        ({"basis": 0}, "basis"),
        ({"basis": 2.5}, "basis"),
        ({"basis": 8, "explore": 8}, "explore=8"),
        ({"explore": 128}, "explore=128"),
        ({"explore": -1}, "explore"),
        ({"explore": True}, "explore"),
        ({"basis": "full", "explore": 1}, "explore=1"),
        ({"stagger": 1}, "stagger"),
    ],
)
def test_bad_options_are_refused_by_name(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        GreedyLore(4, **options)


def test_by_name_from_json() -> None:
    for options in ({"basis": "full", "probes": 4}, {"basis": 16, "explore": 4}, {}):
        made = Section.parse(
            {"compressor": "greedylore", "rank": 2, "restart_every": 50, **options}
        ).make_compressor()
        assert made == GreedyLore(2, restart_every=50, **options)


def test_initial_basis_is_refused() -> None:
    with pytest.raises(ConfigError, match="greedylore has no Q"):
        simulation(GreedyLore(2), {"w": (9, 6)}, initial_basis={"w": torch.eye(6, 2)})
