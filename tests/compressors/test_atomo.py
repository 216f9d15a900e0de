"""ATOMO: probabilities, draws, unbiasedness, and what is on the wire."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from lowrank_comm import Atomo, ConfigError
from lowrank_comm.compressors.atomo import probabilities, systematic
from lowrank_comm.compressors.base import Compressor
from lowrank_comm.config import Section
from lowrank_comm.error_feedback.options import ErrorFeedback
from lowrank_comm.numerics.randomness import uniform
from tests.support import checks
from tests.support.driver import simulation
from tests.support.gloo import GlooPool
from tests.support.reference import gradient, spectrum_matrix

SCHEMES = [Atomo(2), Atomo(2, sampling="bernoulli"), Atomo(2, contractive=True)]
WITH_MEMORY = [Atomo(2, contractive=True), Atomo(2, sampling="bernoulli", contractive=True)]
SPECTRA = {
    "1/k": 1.0 / np.arange(1, 11),
    "flat": np.ones(10),
    "one large": np.array([100.0] + [1.0] * 9),
    "0.5^k": 0.5 ** np.arange(10),
    "rank 2": np.array([2.0, 1.0] + [0.0] * 8),
    "repeated": np.array([3.0, 3.0, 3.0, 1.0, 1.0, 1.0, 1.0, 0.1, 0.1, 0.1]),
}


@pytest.mark.parametrize("check", checks.COMMON, ids=lambda check: check.__name__)
@pytest.mark.parametrize("scheme", WITH_MEMORY, ids=repr)
def test_invariants(scheme: Compressor, check: Callable[[Compressor], None]) -> None:
    check(scheme)


@pytest.mark.parametrize("scheme", SCHEMES[:2], ids=repr)
def test_gloo_equals_simulation(gloo: GlooPool, scheme: Compressor) -> None:
    checks.processes_equal_simulation(gloo, scheme)


def test_bytes_of_systematic_sampling() -> None:
    """r (m + n) for every matrix at every step."""
    checks.bytes_are_as_said(SCHEMES[0], 4)


# --- probabilities ---


def water_filled(s: np.ndarray, r: int) -> np.ndarray:
    """As the paper's text is usually told: shares in proportion; who is above 1 becomes
    1; again with the rest.
    """
    active = s > 0
    if active.sum() <= r:
        return active.astype(float)
    p, full = np.zeros_like(s), np.zeros(len(s), dtype=bool)
    while True:
        p = np.where(full, 1.0, (r - full.sum()) * s / s[~full].sum())
        if not (over := p > 1 + 1e-12).any():
            return p
        full |= over


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("r", [1, 2, 3, 7, 10])
def test_water_filling(spectrum: str, r: int) -> None:
    s = SPECTRA[spectrum]
    # whatever the scale
    p = probabilities(torch.from_numpy(s)[None] * 1e-3, r)[0].numpy()
    np.testing.assert_allclose(p, water_filled(s, r), atol=1e-12)
    assert p.sum() == pytest.approx(min(r, (s > 0).sum()), abs=1e-12)
    assert ((p > 0) == (s > 0)).all()


def test_water_filling_has_the_least_variance() -> None:
    """sum s^2 (1/p - 1) of it against 2 000 other probabilities of the same sum, and
    against min(1, r s / sum s), which sends fewer than r.
    """
    s, r = SPECTRA["1/k"], 3
    p = water_filled(s, r)
    least = (s**2 * (1 / p - 1)).sum()
    generator = np.random.default_rng(0)
    for _ in range(2000):
        other = np.clip(p * np.exp(0.3 * generator.standard_normal(10)), 1e-6, 1)
        for _ in range(50):
            other = np.clip(other * r / other.sum(), 1e-6, 1)
        assert (s**2 * (1 / other - 1)).sum() >= least - 1e-9
    naive = np.minimum(1, r * s / s.sum())
    assert naive.sum() == pytest.approx(2.976, abs=1e-3)


# --- draws ---

DRAWS = 20_000


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("r", [1, 3, 10])
def test_systematic_draws_have_one_count_and_the_marginals(spectrum: str, r: int) -> None:
    s = torch.from_numpy(SPECTRA[spectrum])
    p = probabilities(s[None], r)
    u = uniform(
        0, tuple(f"{k}" for k in range(2000)), 0, "test", (10,), torch.float64, torch.device("cpu")
    ).reshape(-1, 1)
    chosen = systematic(p.expand(DRAWS, -1), s.expand(DRAWS, -1), u)
    assert (chosen.sum(-1) == min(r, int((s > 0).sum()))).all()
    error = (p[0] * (1 - p[0]) / DRAWS).sqrt() + 1e-9
    assert float(((chosen.double().mean(0) - p[0]).abs() / error).max()) < 4


def test_the_ends_of_the_uniform_interval() -> None:
    """u = 0 and u next to 1; sums that round below and above their integer."""
    generator = torch.Generator().manual_seed(0)
    s = (
        torch.rand(3000, 40, generator=generator, dtype=torch.float64)
        .sort(-1, descending=True)
        .values
    )
    p = probabilities(s, 7)
    for u in (0.0, 2.0**-24, 0.5, 1 - 2.0**-24):
        assert (systematic(p, s, torch.full((3000, 1), u, dtype=torch.float64)).sum(-1) == 7).all()


def sent_by(scheme: Atomo, matrix: np.ndarray, draws: int, workers: int = 1) -> torch.Tensor:
    """What the first step applies, for independent draws: a batch of equal matrices
    with names of their own.
    """
    names = [f"draw{k}" for k in range(draws)]
    given = torch.from_numpy(matrix)
    sim = simulation(scheme, dict.fromkeys(names, matrix.shape), workers)
    out = sim.reduce([{name: given.clone() for name in names}] * workers)
    return torch.stack([out[name] for name in names])


@pytest.mark.parametrize("sampling", ["systematic", "bernoulli"])
def test_unbiased_with_the_variance_of_the_formula(sampling: str) -> None:
    """20 000 draws, 4 standard errors; the variance, the same for both ways to draw, is
    sum s^2 (1/p - 1). Controls: the atoms cut to r where more were drawn, and weights
    that leave out 1/p, are biased.
    """
    s, r = SPECTRA["1/k"], 3
    matrix = spectrum_matrix(12, 10, s, 1)
    values = sent_by(Atomo(r, sampling=sampling), matrix, DRAWS)
    exact = torch.from_numpy(matrix)
    error = values.std(0) / DRAWS**0.5
    # of 120 entries
    assert float(((values.mean(0) - exact).abs() / error).max()) < 4.3
    squares = (values - exact).square().sum((1, 2))
    wanted = (s**2 * (1 / water_filled(s, r) - 1)).sum()
    assert float(squares.mean()) == pytest.approx(wanted, abs=4 * float(squares.std()) / DRAWS**0.5)
    if sampling == "bernoulli":
        p = torch.from_numpy(water_filled(s, r))
        names = tuple(f"draw{k}" for k in range(2000))
        drawn = (
            uniform(1, names, 0, "control", (10, 10), torch.float64, torch.device("cpu")).reshape(
                -1, 10
            )
            < p
        )
        cut = drawn & (drawn.cumsum(-1) <= r)
        counts = drawn.sum(-1)
        assert int(counts.max()) > r
        coordinates = torch.from_numpy(s) / p
        for kept, weights in ((cut, coordinates), (drawn, torch.from_numpy(s))):
            kept_values = kept.double() * weights
            bias = (kept_values.mean(0) - torch.from_numpy(s)).abs() / (
                kept_values.std(0) / DRAWS**0.5 + 1e-12
            )
            assert float(bias.max()) > 20
        whole = drawn.double() * coordinates
        fair = (whole.mean(0) - torch.from_numpy(s)).abs() / (whole.std(0) / DRAWS**0.5 + 1e-12)
        assert float(fair.max()) < 4


@pytest.mark.parametrize("form", ["ef14", "ef21", "ef21_sgdm"])
def test_error_feedback_around_the_unbiased_form_is_refused(form: str) -> None:
    with pytest.raises(ConfigError, match="contractive"):
        simulation(Atomo(2), {"w": (9, 7)}, error_feedback=ErrorFeedback(form=form))
    simulation(Atomo(2, contractive=True), {"w": (9, 7)}, error_feedback=ErrorFeedback(form=form))


def test_workers_draw_apart() -> None:
    """Equal matrices on four workers: the variance of the mean is a quarter. With
    shared draws it would be the whole.
    """
    s, r = SPECTRA["1/k"], 3
    matrix = spectrum_matrix(12, 10, s, 1)
    exact = torch.from_numpy(matrix)
    wanted = (s**2 * (1 / water_filled(s, r) - 1)).sum()
    squares = (sent_by(Atomo(r), matrix, 2000, workers=4) - exact).square().sum((1, 2))
    assert float(squares.mean()) == pytest.approx(
        wanted / 4, abs=4 * float(squares.std()) / 2000**0.5
    )


@pytest.mark.parametrize("spectrum", SPECTRA)
def test_contractive_after_division_by_1_plus_omega(spectrum: str) -> None:
    """E||C(x) - x||^2 = (1 - 1/(1 + omega)) ||x||^2, 2 000 draws, 4 standard errors;
    without the division the distance is omega ||x||^2, above ||x||^2 for a flat
    spectrum (control).
    """
    s, r = SPECTRA[spectrum], 2
    matrix = spectrum_matrix(12, 10, s, 1)
    exact, total = torch.from_numpy(matrix), float((s**2).sum())
    # 1 + omega
    grown = float(sum(s[s > 0] ** 2 / water_filled(s, r)[s > 0])) / total
    for scheme, wanted in ((Atomo(r, contractive=True), 1 - 1 / grown), (Atomo(r), grown - 1)):
        squares = (sent_by(scheme, matrix, 2000) - exact).square().sum((1, 2)) / total
        assert float(squares.mean()) == pytest.approx(
            wanted, abs=4 * float(squares.std()) / 2000**0.5 + 1e-10
        )
    assert spectrum != "flat" or grown - 1 > 1


def test_what_each_form_is() -> None:
    """Which error feedback goes with it, and that no sum of messages is a message."""
    plain, contractive = Atomo(2), Atomo(2, contractive=True)
    assert (plain.unbiased, plain.contractive, plain.feedback) == (True, False, "none")
    assert (contractive.unbiased, contractive.contractive, contractive.feedback) == (
        False,
        True,
        "ef14",
    )
    assert not plain.linear
    assert not plain.row_blocks


# --- against NumPy, and on the wire ---


@pytest.mark.parametrize("scheme", SCHEMES, ids=repr)
@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_fifteen_steps_as_written(shape: tuple[int, int], scheme: Atomo) -> None:
    """Three workers in NumPy from the library's uniform numbers; with an error memory
    for the contractive form only.
    """
    workers, r = 3, 2
    sim = simulation(scheme, {"w": shape}, workers, seed=8)
    errors = [np.zeros(shape) for _ in range(workers)]
    for t in range(15):
        gradients = [gradient(shape, t, worker) for worker in range(workers)]
        sent = []
        for worker in range(workers):
            u, s, vt = np.linalg.svd(gradients[worker] + errors[worker], full_matrices=False)
            p = water_filled(s, r)
            count = 7 if scheme.sampling == "bernoulli" else 1
            name = f"atoms of worker {worker}"
            draw = uniform(8, ("w",), t, name, (count,), torch.float64, torch.device("cpu"))[
                0
            ].numpy()
            if scheme.sampling == "bernoulli":
                chosen = draw < p
            else:
                ends = np.concatenate([[0], np.cumsum(p)])
                chosen = np.array(
                    [
                        np.floor(ends[k + 1] - draw[0] + 1e-12)
                        > np.floor(ends[k] - draw[0] + 1e-12)
                        for k in range(7)
                    ]
                )
                assert chosen.sum() == r
            weights = np.where(chosen, s / p, 0)
            if scheme.contractive:
                weights = weights * (s**2).sum() / (s**2 / p).sum()
            sent.append((u * weights) @ vt)
        applied = sim.reduce([{"w": torch.from_numpy(g.copy())} for g in gradients])["w"].numpy()
        np.testing.assert_allclose(applied, sum(sent) / workers, rtol=1e-9, atol=1e-9)
        assert set(sim.error_memory(0)) == ({"w"} if scheme.contractive else set())
        if scheme.contractive:
            errors = [g + e - s for g, e, s in zip(gradients, errors, sent, strict=True)]
            for worker in range(workers):
                np.testing.assert_allclose(
                    sim.error_memory(worker)["w"].numpy(), errors[worker], rtol=1e-9, atol=1e-9
                )


def test_independent_draws_are_padded_to_the_largest_count_of_each_matrix() -> None:
    """One count a matrix goes ahead, an int32; then each matrix travels with the
    largest count over the workers, at least one. The counts are recomputed from the
    draws.
    """
    shapes, workers, r = {"w": (12, 7), "v": (12, 7), "x": (5, 9)}, 3, 3
    sim = simulation(Atomo(r, sampling="bernoulli"), shapes, workers, seed=2)
    beyond = False
    for t in range(6):
        gradients = [checks.drawn(t, worker, shapes) for worker in range(workers)]
        expected = 0
        for name, (m, n) in shapes.items():
            counts = []
            for worker in range(workers):
                p = water_filled(torch.linalg.svdvals(gradients[worker][name]).numpy(), r)
                purpose = f"atoms of worker {worker}"
                draw = uniform(
                    2, (name,), t, purpose, (len(p),), torch.float64, torch.device("cpu")
                )[0].numpy()
                counts.append(int((draw < p).sum()))
            expected += 8 * (m + n) * max(1, *counts)
            beyond |= max(counts) > r
        sim.reduce(gradients)
        assert sim.last_reports[0].bytes["gather"] == expected
        assert sim.last_reports[0].bytes["counts"] == 4 * len(shapes)
    assert beyond


def test_full_rank_of_each_workers_matrix_is_exact_though_the_mean_has_more() -> None:
    """Rank 1 on each of four workers, r = 1: the mean has rank 4, and comes through."""
    parts = [checks.low_rank(9, 7, 1, seed) for seed in range(4)]
    sim = simulation(Atomo(1), {"w": (9, 7)}, 4)
    applied = sim.reduce([{"w": part.clone()} for part in parts])["w"]
    torch.testing.assert_close(applied, sum(parts) / 4, rtol=1e-12, atol=1e-12)
    assert int(torch.linalg.matrix_rank(applied)) == 4


def test_by_name_from_json() -> None:
    section = {"compressor": "atomo", "rank": 2, "sampling": "bernoulli", "contractive": True}
    assert Section.parse(section).make_compressor() == Atomo(
        2, sampling="bernoulli", contractive=True
    )


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_huge_and_tiny_matrices(scale: float) -> None:
    for scheme in SCHEMES:
        sim = simulation(scheme, {"w": (9, 7)}, 2, dtype=torch.float32)
        given = [(checks.low_rank(9, 7, 2, seed) * scale).float() for seed in range(2)]
        applied = sim.reduce([{"w": g.clone()} for g in given])["w"]
        assert checks.relative(applied.double(), (given[0].double() + given[1].double()) / 2) < 1e-5


@pytest.mark.parametrize(
    ("options", "said"),
    [({"sampling": "top"}, "'top'"), ({"contractive": 1}, "contractive"), ({"rank": 0}, "rank")],
)
def test_bad_options_are_refused_by_name(options: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Atomo(**options)
