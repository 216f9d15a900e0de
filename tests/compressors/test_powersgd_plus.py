"""PowerSGD with several power iterations, and PowerSGD+'s restarts: the rule that
"auto" takes, by greedy choice and by random projection.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lowrank_comm import ConfigError, GaLore, PowerSGD, PowerSGDPlus
from lowrank_comm.compressors import powersgd_plus
from lowrank_comm.compressors.base import Compressor, Context, Delta
from lowrank_comm.compressors.requests import Mean
from lowrank_comm.config import Section
from lowrank_comm.numerics.device import accelerator_path
from lowrank_comm.numerics.randomness import gaussian
from tests.support import checks
from tests.support.checks import Driven
from tests.support.driver import dense, elements_at, simulation
from tests.support.gloo import GlooPool
from tests.support.reference import gradient, spectrum_matrix, ssp_comp
from tests.support.spectra import SPECTRA, captured

every_spectrum = pytest.mark.parametrize("spectrum", SPECTRA)


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


@pytest.mark.parametrize("compressor", [PowerSGDPlus(4, restart="svd"), GaLore(4)], ids=repr)
@pytest.mark.parametrize("shape", [(1030, 1024), (1024, 1030)])
def test_the_svd_restart_of_a_large_matrix_captures_almost_as_much(
    compressor: Compressor, shape: tuple[int, int]
) -> None:
    """More than 2^20 elements, whose leading singular vectors come from a Krylov space:
    of a spectrum that falls by a tenth, 0.999 of the exact energy; and what is applied
    is a projection.
    """
    values = 0.9 ** np.arange(60.0)
    u, v = (np.linalg.qr(gradient((side, 60), 0, 0))[0] for side in shape)
    given = torch.from_numpy((u * values) @ v.T)
    applied = simulation(compressor, {"w": shape}, 1).reduce([{"w": given.clone()}])["w"]
    best = float((values[:4] ** 2).sum())
    assert 0.999 * best <= float(applied.norm() ** 2) <= best * (1 + 1e-9)
    assert abs(float((applied * (given - applied)).sum())) < 1e-9 * best


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


@pytest.fixture
def up_to_100(monkeypatch: pytest.MonkeyPatch) -> None:
    """A limit of restart="auto" that costs no time."""
    monkeypatch.setattr(powersgd_plus, "SVD_ELEMENTS", 100)


BESIDE = {"at most": (10, 10), "more": (10, 11)}


@pytest.mark.usefixtures("up_to_100")
@pytest.mark.parametrize("workers", [1, 3])
def test_auto_is_the_svd_for_small_matrices_and_a_fresh_q_for_large_ones(workers: int) -> None:
    """Number by number what the rules named do, restarts and steps between."""

    def trained(**options: Any) -> list[dict[str, Tensor]]:
        sim = simulation(PowerSGDPlus(2, restart_every=3, **options), BESIDE, workers)
        return [
            {k: v.clone() for k, v in sim.reduce(given).items()}
            for given in ([checks.drawn(t, w, BESIDE) for w in range(workers)] for t in range(7))
        ]

    auto, svd, randomized = trained(), trained(restart="svd"), trained(restart="randomized")
    for t in range(7):
        assert torch.equal(auto[t]["at most"], svd[t]["at most"])
        assert torch.equal(auto[t]["more"], randomized[t]["more"])
        assert not torch.equal(auto[t]["at most"], randomized[t]["at most"])
        assert not torch.equal(auto[t]["more"], svd[t]["more"])


@pytest.mark.usefixtures("up_to_100")
@pytest.mark.parametrize("option", ["exact_restart", "consensus_restart"])
def test_auto_is_the_svd_for_all_with_its_options(option: str) -> None:
    auto, svd = (
        simulation(PowerSGDPlus(2, restart_every=3, restart=restart, **{option: True}), BESIDE)
        for restart in ("auto", "svd")
    )
    for t in range(4):
        given = checks.drawn(t, 0, BESIDE)
        one, other = (sim.reduce([{k: g.clone() for k, g in given.items()}]) for sim in (auto, svd))
        assert all(torch.equal(one[name], other[name]) for name in BESIDE)


def test_the_limit_of_auto_and_what_it_sends() -> None:
    auto = PowerSGDPlus(4)
    assert auto.restart_rule(1024, 1024) == ("svd", "of at most 2^20 elements")
    assert auto.restart_rule(1024, 1025) == ("randomized", "of more than 2^20 elements")
    assert auto.restart_elements(1024, 1024, 4) == 1024 * 1024 + 4 * 1024
    assert auto.restart_elements(1024, 1025, 4) == 2 * 4 * (1024 + 1025)
    assert PowerSGDPlus(4, exact_restart=True).restart_rule(4096, 4096)[0] == "svd"
    # a choice of the algorithm, and not of a device's path
    with accelerator_path():
        assert auto.restart_rule(8, 8)[0] == "svd"


@pytest.mark.usefixtures("up_to_100")
def test_auto_judges_the_whole_matrix_of_which_a_rank_holds_a_block_of_rows() -> None:
    for m, first in ((10, (1, 5, 10)), (11, (1, 5, 2))):
        context = Context(("w",), 0, 0, 2, restart=True, m=m, rows=slice(0, 5), in_blocks=True)
        asked = next(PowerSGDPlus(2).step(Delta(torch.ones(1, 5, 10)), {}, context))
        assert isinstance(asked, Mean)
        assert asked.tensor.shape == first


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
    costs = [elements_at(greedy, 100, 50, 2, t, True) for t in range(0, 70, 10)]
    assert costs == [found, between, between, found, between, between, found]
    # their mean, rounded up
    assert greedy.restart_elements(100, 50, 2) == -(-(found + 2 * between) // 3)
    assert elements_at(greedy, 100, 50, 2, 5, False) == 2 * 150


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
    for restart in ("auto", "svd", "randomized", "random_projection"):
        assert PowerSGDPlus(2, restart=restart).row_blocks
    assert not PowerSGDPlus(2, restart="greedy").row_blocks


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: PowerSGD(2, power_iterations=0), "power_iterations"),
        (lambda: PowerSGDPlus(2, power_iterations=True), "power_iterations"),
        (lambda: PowerSGDPlus(2, restart="greedi"), "'greedi'"),
        (
            lambda: PowerSGDPlus(2, basis_every=3),
            'basis_every=3 has no meaning with restart="auto"',
        ),
        (lambda: PowerSGDPlus(2, restart="svd", basis_every=3), "basis_every=3"),
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
