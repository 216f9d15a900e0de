"""Formulas in presets."""

from __future__ import annotations

from fractions import Fraction

import pytest

from lowrank_comm import ConfigError
from lowrank_comm.lab.experiments.formulas import evaluate


def test_formulas() -> None:
    values = {"m": 7, "n": 4, "tau": 3}
    assert evaluate("(m + n) * 2 - m * n / tau", values) == Fraction(22) - Fraction(28, 3)
    assert evaluate("min(m, 2 * n) + max(m, n) + m // 2", values) == 7 + 7 + 3


@pytest.mark.parametrize(
    "formula",
    ["__import__('os')", "m.real", "q + 1", "m ** n", "min()", "1.5 * m", "m +", "-m", "True"],
)
def test_what_is_no_formula_is_refused(formula: str) -> None:
    with pytest.raises(ConfigError, match="formula"):
        evaluate(formula, {"m": 1, "n": 2})
