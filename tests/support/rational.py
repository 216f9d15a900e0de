"""Rank-1 PowerSGD in exact rational arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

Rational = list[list[Fraction]]


def matmul(a: Rational, b: Rational) -> Rational:
    return [
        [
            sum((x * y for x, y in zip(row, column, strict=True)), Fraction(0))
            for column in zip(*b, strict=True)
        ]
        for row in a
    ]


def combine(*terms: tuple[Fraction | int, Rational]) -> Rational:
    """Sum of c * matrix."""
    rows, columns = len(terms[0][1]), len(terms[0][1][0])
    return [
        [sum((c * m[i][j] for c, m in terms), Fraction(0)) for j in range(columns)]
        for i in range(rows)
    ]


def transposed(a: Rational) -> Rational:
    return [list(column) for column in zip(*a, strict=True)]


class RationalPowerSGD:
    """Rank-1 PowerSGD without a square root: P~ P~^T = p p^T / (p^T p) is rational, and
    Q = Delta^T p has the direction of the paper's Q.
    """

    def __init__(self, size: int, workers: int, basis: Sequence[int | Fraction]) -> None:
        self.q: Rational = [[Fraction(b)] for b in basis]
        self.errors: list[Rational] = [
            [[Fraction(0)] * size for _ in range(size)] for _ in range(workers)
        ]

    def step(self, gradients: Sequence[Rational]) -> Rational:
        count = len(gradients)
        deltas = [combine((1, g), (1, e)) for g, e in zip(gradients, self.errors, strict=True)]
        p = matmul(combine(*((Fraction(1, count), delta) for delta in deltas)), self.q)
        square = sum(entry[0] ** 2 for entry in p)
        assert square != 0, "P = 0: the paper's algorithm does not say what follows"
        projector = [[a[0] * b[0] / square for b in p] for a in p]
        sent = [matmul(projector, delta) for delta in deltas]
        self.errors = [combine((1, delta), (-1, s)) for delta, s in zip(deltas, sent, strict=True)]
        self.q = combine(*((Fraction(1, count), matmul(transposed(delta), p)) for delta in deltas))
        return combine(*((Fraction(1, count), s) for s in sent))
