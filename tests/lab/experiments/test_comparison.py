"""Comparisons over common seeds, with their spread."""

from __future__ import annotations

import math

import pytest

from lowrank_comm.lab.experiments.comparison import Spread, difference, ratio, student_t, verdict


def test_quantiles_of_student() -> None:
    """Against the printed tables."""
    for degrees, value in ((1, 12.706), (2, 4.303), (4, 2.776), (10, 2.228), (30, 2.042)):
        assert student_t(degrees) == pytest.approx(value, abs=6e-4)
    assert student_t(5, 0.95) == pytest.approx(2.015, abs=6e-4)


def test_only_common_seeds_are_compared() -> None:
    found = difference({1: 3.0, 2: 5.0, 3: 90.0}, {1: 1.0, 2: 2.0, 4: 0.0})
    assert found == Spread(2, 2.5, pytest.approx(math.sqrt(0.5)))
    assert ratio({1: 3.0}, {2: 1.0}) is None
    assert Spread.of([2.0]) == Spread(1, 2.0, None)


def test_a_difference_is_told_by_its_spread() -> None:
    """t_{0.975, 2} = 4.303: three differences of mean 1 and deviation s differ from
    zero if 1 > 4.303 s / sqrt(3).
    """
    clear, unclear = Spread(3, 1.0, 0.40), Spread(3, 1.0, 0.41)
    assert (clear.sign, unclear.sign, Spread(3, -1.0, 0.1).sign, Spread(1, 1.0, None).sign) == (
        1,
        0,
        -1,
        None,
    )
    assert "a > b: holds" in verdict("a > b", clear, 1, 2)
    assert "**contradicted**" in verdict("a < b", clear, -1, 2)
    assert "undecided, inside the spread" in verdict("a < b", unclear, -1, 2)
    assert "no difference seen, as claimed" in verdict("a = b", unclear, 0, 2)
    assert "**a difference is seen**" in verdict("a = b", clear, 0, 2)
    assert "no spread is known; the sign is the other one" in verdict(
        "a < b", Spread(1, 1.0, None), -1, 2
    )
    assert verdict("a < b", None, -1, 2) == "a < b: not measured."
