"""Theorem 1: PowerSGD stays trapped, PowerSGD+ leaves. In exact rational arithmetic and
in the float window.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from lowrank_comm.lab.problems import theorem1
from tests.support.rational import Rational, RationalPowerSGD, combine


def slope(x: Fraction) -> Fraction:
    """psi' of psi(x) = x^2 for |x| <= 1, else 2 |x| - 1."""
    return 2 * x if abs(x) <= 1 else Fraction(2 if x > 0 else -2)


A2: Rational = [[Fraction(1), Fraction(-1)], [Fraction(-1), Fraction(1)]]

B2: Rational = [[Fraction(1)] * 2] * 2


def oracle(x: Fraction, coin: int, sigma: Fraction) -> Rational:
    """g = G + xi (sigma B - G), G = psi'(x) A."""
    return combine((slope(x) * (1 - coin), A2), (sigma * coin, B2))


def functional(x: Rational) -> Fraction:
    """D^T X D = x11 - x12 - x21 + x22."""
    return x[0][0] - x[0][1] - x[1][0] + x[1][1]


@pytest.mark.parametrize(
    "start",
    [[[1, 0], [0, 1]], [[Fraction(1, 3), 0], [0, Fraction(1, 7)]]],
    ids=["|x| > 1", "|x| < 1"],
)
@pytest.mark.parametrize("workers", [1, 3, 5])
def test_powersgd_is_trapped_in_exact_arithmetic(
    workers: int, start: list[list[Fraction | int]]
) -> None:
    """200 steps of momentum SGD, learning rates that change, any Q_{-1}: the slope psi'
    stays exactly what it was, the updates are multiples of B, the errors multiples of
    A; uncompressed, the same oracle moves at once.
    """
    sigma, momentum_factor = Fraction(3), Fraction(9, 10)
    x: Rational = [[Fraction(entry) for entry in row] for row in start]
    uncompressed = [list(row) for row in x]
    first = slope(functional(x))
    compressor = RationalPowerSGD(2, workers, [Fraction(2, 7), Fraction(-1, 5)])
    momentum: Rational = [[Fraction(0)] * 2 for _ in range(2)]
    coins = np.random.default_rng(workers).choice([-1, 1], size=(200, workers))
    coins[0] = 1
    for t, row in enumerate(coins):
        applied = compressor.step([oracle(functional(x), int(coin), sigma) for coin in row])
        assert applied[0] == applied[1] == [applied[0][0]] * 2
        assert all(combine((error[0][0], A2)) == error for error in compressor.errors)
        momentum = combine((momentum_factor, momentum), (1, applied))
        # Momentum's denominators would grow by a digit a step. Rounded to another
        # multiple of B, they do not.
        momentum = combine((momentum[0][0].limit_denominator(10**6), B2))
        x = combine((1, x), (-Fraction(1, 10 + t), momentum))
        assert slope(functional(x)) == first
        if t < 10:
            gradients = [oracle(functional(uncompressed), int(coin), sigma) for coin in row]
            uncompressed = combine(
                (1, uncompressed), *((-Fraction(1, 10 * workers), g) for g in gradients)
            )
    assert functional(uncompressed) != functional(
        [[Fraction(entry) for entry in row] for row in start]
    )
    assert any(error[0][0] != 0 for error in compressor.errors)


def paper_problem(
    section: dict[str, Any],
    dtype: torch.dtype,
    workers: int,
    steps: int,
    basis: tuple[float, float],
    rotation: int | None,
) -> list[float]:
    """D^T X D before each step, by the library, on the paper's own 2 x 2 problem (sigma
    = 3, all coins +1 at first).
    """
    run = theorem1.train(
        theorem1.Problem(1, workers, 3.0, dtype, rotation),
        section,
        lambda parameters: torch.optim.SGD(parameters, lr=0.02),
        steps,
        first_basis=basis,
        rate_at=lambda t: 1 / (1 + t / 200),
    )
    return run.values[:-1]


POWERSGD = {"compressor": "powersgd", "rank": 1}

POWERSGD_PLUS = {"compressor": "powersgd_plus", "rank": 1}


@pytest.mark.parametrize(
    ("dtype", "window", "tolerance"), [(torch.float64, 8, 1e-3), (torch.float32, 5, 1e-3)]
)
@pytest.mark.parametrize("basis", [(0.3, 1.1), (-2.0, 0.5), (1.0, 0.0)])
@pytest.mark.parametrize("workers", [1, 3, 5])
@pytest.mark.parametrize("rotation", [None, 0], ids=["paper's coordinates", "rotated"])
def test_powersgd_is_trapped_within_the_float_window(
    rotation: int | None,
    workers: int,
    basis: tuple[float, float],
    dtype: torch.dtype,
    window: int,
    tolerance: float,
) -> None:
    """Round-off frees PowerSGD after some 9 steps in float64, 6 in float32, where
    coordinates are not the paper's; before that nothing of the gradient comes through,
    while PowerSGD+ that restarts within the window has moved.
    """
    trapped = paper_problem(POWERSGD, dtype, workers, window + 1, basis, rotation)
    assert trapped[0] == pytest.approx(2.0, rel=1e-6)
    assert max(abs(value - 2.0) for value in trapped) < tolerance
    free = paper_problem(
        POWERSGD_PLUS | {"restart_every": 2}, dtype, workers, window + 1, basis, rotation
    )
    assert abs(free[-1] - 2.0) > 0.02


def test_round_off_opens_the_trap_in_rotated_coordinates() -> None:
    """The reason why the tests above have a window, and the example's problem none."""
    values = paper_problem(POWERSGD, torch.float64, 3, 40, (0.3, 1.1), 0)
    assert abs(values[-1] - 2.0) > 0.1


@pytest.mark.parametrize("restart", ["svd", "randomized"])
def test_powersgd_plus_converges_on_the_papers_problem(restart: str) -> None:
    """N = 4, tau = 10, decaying rate: mean ||grad f||^2 = 4 psi'^2 over the last
    quarter of 600 steps.
    """
    section = POWERSGD_PLUS | {"restart_every": 10, "restart": restart}
    values = paper_problem(section, torch.float64, 4, 600, (0.3, 1.1), None)
    squared = [4 * (2 * value if abs(value) <= 1 else 2.0) ** 2 for value in values]
    assert squared[0] == 16.0
    assert np.mean(squared[-150:]) < 1e-8
