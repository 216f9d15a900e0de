"""Scores against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lowrank_comm.lab.data.metrics import METRICS, accuracy, f1, matthews, pearson, spearman


def test_scores_against_values_worked_out_by_hand() -> None:
    """TP 3, FP 1, FN 2, TN 4."""
    labels = [1, 1, 1, 1, 1, 0, 0, 0, 0, 0]
    predicted = [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert accuracy(predicted, labels) == 0.7
    assert f1(predicted, labels) == pytest.approx(6 / 9)
    assert matthews(predicted, labels) == pytest.approx((3 * 4 - 1 * 2) / math.sqrt(4 * 5 * 5 * 6))
    assert spearman([1, 2, 3, 4], [1, 10, 100, 1000]) == pytest.approx(1.0)
    assert spearman([1, 2, 2, 4], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_correlations_against_numpy() -> None:
    draw = np.random.default_rng(1)
    x, y = draw.normal(size=50), draw.normal(size=50)
    assert pearson(list(x), list(x + y)) == pytest.approx(np.corrcoef(x, x + y)[0, 1])
    order = np.argsort(np.argsort(x)), np.argsort(np.argsort(x + y))
    assert spearman(list(x), list(x + y)) == pytest.approx(np.corrcoef(*order)[0, 1])
    # Matthews' coefficient is Pearson's of two-valued variables
    bits, others = x > 0, x + y > 0
    assert matthews(list(bits), list(others)) == pytest.approx(np.corrcoef(bits, others)[0, 1])


@pytest.mark.parametrize("name", ["f1", "matthews", "pearson", "spearman"])
def test_a_constant_prediction_has_score_zero(name: str) -> None:
    assert METRICS[name]([0, 0, 0, 0], [0, 1, 0, 1]) == 0
