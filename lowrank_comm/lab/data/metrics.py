"""The scores of sentence tasks, from predictions and labels: accuracy, F1, Matthews',
Pearson's and Spearman's correlation.

The computation is scikit-learn's and SciPy's. All functions take sequences of one
length; a score whose denominator is zero is 0, as in the benchmark's own code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

Numbers = Sequence[float]


def accuracy(predicted: Numbers, labels: Numbers) -> float:
    """Return the share of equal pairs."""
    return float(accuracy_score(labels, predicted))


def f1(predicted: Numbers, labels: Numbers) -> float:
    """Return 2 TP / (2 TP + FP + FN), of label 1."""
    return float(f1_score(labels, predicted, zero_division=0.0))


def matthews(predicted: Numbers, labels: Numbers) -> float:
    """Return (TP TN - FP FN) / sqrt((TP + FP)(TP + FN)(TN + FP)(TN + FN))."""
    return float(matthews_corrcoef(labels, predicted))


def pearson(predicted: Numbers, labels: Numbers) -> float:
    """Return the covariance over the product of the standard deviations."""
    if _constant(predicted) or _constant(labels):
        return 0.0
    return float(stats.pearsonr(predicted, labels).statistic)


def spearman(predicted: Numbers, labels: Numbers) -> float:
    """Return Pearson's correlation of the ranks; equal values share the mean rank."""
    if _constant(predicted) or _constant(labels):
        return 0.0
    return float(stats.spearmanr(predicted, labels).statistic)


def _constant(values: Numbers) -> bool:
    return min(values) == max(values)


METRICS: dict[str, Callable[[Numbers, Numbers], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
