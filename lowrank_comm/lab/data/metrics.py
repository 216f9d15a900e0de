"""The scores of sentence tasks, from predictions and labels: accuracy, F1, Matthews',
Pearson's and Spearman's correlation.

Written out, since the packages that have them are large. All take sequences of one
length; a score whose denominator is zero is 0, as in the benchmark's own code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

Numbers = Sequence[float]


def accuracy(predicted: Numbers, labels: Numbers) -> float:
    """Share of equal pairs."""
    return sum(p == y for p, y in zip(predicted, labels, strict=True)) / len(labels)


def _counts(predicted: Numbers, labels: Numbers) -> tuple[int, int, int, int]:
    """True positives, false positives, false negatives, true negatives of label 1."""
    pairs = list(zip((p == 1 for p in predicted), (y == 1 for y in labels), strict=True))
    return (
        pairs.count((True, True)),
        pairs.count((True, False)),
        pairs.count((False, True)),
        pairs.count((False, False)),
    )


def f1(predicted: Numbers, labels: Numbers) -> float:
    """2 TP / (2 TP + FP + FN), of label 1."""
    hits, false_alarms, misses, _ = _counts(predicted, labels)
    return 2 * hits / (2 * hits + false_alarms + misses) if hits else 0.0


def matthews(predicted: Numbers, labels: Numbers) -> float:
    """(TP TN - FP FN) / sqrt((TP + FP)(TP + FN)(TN + FP)(TN + FN))."""
    tp, fp, fn, tn = _counts(predicted, labels)
    square = (tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)
    return (tp * tn - fp * fn) / math.sqrt(square) if square else 0.0


def pearson(predicted: Numbers, labels: Numbers) -> float:
    """Covariance over the product of the standard deviations."""
    n = len(labels)
    x, y = [v - sum(predicted) / n for v in predicted], [v - sum(labels) / n for v in labels]
    square = sum(v * v for v in x) * sum(v * v for v in y)
    return sum(a * b for a, b in zip(x, y, strict=True)) / math.sqrt(square) if square > 0 else 0.0


def spearman(predicted: Numbers, labels: Numbers) -> float:
    """Pearson's correlation of the ranks; equal values share the mean of theirs."""
    return pearson(_ranks(predicted), _ranks(labels))


def _ranks(values: Numbers) -> list[float]:
    order = sorted(range(len(values)), key=lambda i: values[i])
    ranks, start = [0.0] * len(values), 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for place in order[start : end + 1]:
            ranks[place] = (start + end) / 2
        start = end + 1
    return ranks


METRICS: dict[str, Callable[[Numbers, Numbers], float]] = {
    "accuracy": accuracy,
    "f1": f1,
    "matthews": matthews,
    "pearson": pearson,
    "spearman": spearman,
}
