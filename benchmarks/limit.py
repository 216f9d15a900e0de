"""What this machine allows: the least time of a compressed step, from the speed of its
memory and of its multipliers, measured in the same run.

A step cannot be one pass, since P must be averaged and orthonormalised before Q is
formed from it, and Q averaged before anything is decoded. So there are three stages,
and in each the arrays of the model's size that it reads and writes at least, and the
thin products that it forms:

    Delta = g + e;  P = Delta Q              reads g, e        writes Delta  1 product
    Q_i = Delta^T P                          reads Delta                     1 product
    g = P Q^T;  e = Delta - P Q_i^T          reads Delta       writes g, e   2 products

These are seven arrays, with a workspace or without one (Delta in the place of g). What
is of size m x r or n x r counts nothing, nor do orthonormalising, packing and dense
parameters. A stage takes at least the longer of two times:

    memory      its bytes at the bandwidth of a copy of an array as large as the model
                (a copy of b bytes reads b and writes b)
    products    their time at the best speed that this machine's BLAS reaches for the
                shape: whole, in blocks of rows that lie in the cache, or many small
                matrices together, either layout of the thin factor, the fastest call

and the limit is the sum over the stages. It is a floor: memory and multipliers would
have to be busy at the same time, and in no stage would anything else be done.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.sides import ITEM, Shapes

IN_CACHE = 1 << 17
"""Elements of a block of rows that stays in a core's cache."""
TRIALS_S = 0.004
"""How long one way to form a product is tried."""


@dataclass(frozen=True)
class Stage:
    """A part of a step that needs what all of the part before has given.

    Attributes:
        arrays: of the model's size that are read or written.
        products: that are formed; see `PRODUCTS`.
    """

    arrays: int
    products: tuple[str, ...]


STAGES = (Stage(3, ("times",)), Stage(1, ("transposed",)), Stage(3, ("decode", "update")))
COMPRESSING = 2
"""Stages before anything is decoded."""


def _times(a: Tensor, p: Tensor, q: Tensor) -> None:
    torch.matmul(a, q, out=p)


def _transposed(a: Tensor, p: Tensor, q: Tensor) -> None:
    torch.matmul(p.mT, a)


def _decode(a: Tensor, p: Tensor, q: Tensor) -> None:
    torch.matmul(p, q.mT, out=a)


def _update(a: Tensor, p: Tensor, q: Tensor) -> None:
    add = Tensor.addmm_ if a.dim() == 2 else Tensor.baddbmm_
    add(a, p, q.mT, alpha=-1e-6)


PRODUCTS: Mapping[str, Callable[[Tensor, Tensor, Tensor], None]] = {
    "times": _times,  # A Q
    "transposed": _transposed,  # A^T P
    "decode": _decode,  # A = P Q^T
    "update": _update,  # A = A - P Q^T
}


def matrices_of(shapes: Shapes) -> list[tuple[int, int]]:
    """Return the shapes of the matrices."""
    return [(shape[0], shape[1]) for shape in shapes if len(shape) == 2]


class Products:
    """The least seconds of each product of a model's matrices, over all trials so far.

    Args:
        shapes: of the model.
        rank: of the products.
    """

    def __init__(self, shapes: Shapes, rank: int) -> None:
        self._matrices, self._rank = matrices_of(shapes), rank
        self._best: dict[tuple[str, int, int], float] = {}

    def measure(self) -> None:
        """Try all ways to form them once more."""
        for m, n in set(self._matrices):
            for a, p, q in _ways(m, n, self._rank):
                for kind, form in PRODUCTS.items():
                    spent = _fastest(functools.partial(form, a, p, q)) * m * n / a.numel()
                    key = (kind, m, n)
                    self._best[key] = min(spent, self._best.get(key, spent))

    def seconds(self, kind: str) -> float:
        """Return the time of one kind for all matrices."""
        return sum(self._best[kind, m, n] for m, n in self._matrices)

    def gflops(self, kind: str) -> float:
        """Return the speed of one kind, a multiplication and an addition being two."""
        elements = sum(m * n for m, n in self._matrices)
        return 2 * elements * self._rank / self.seconds(kind) / 1e9


class Copy:
    """A copy of an array as large as the model.

    Args:
        shapes: of the model.
    """

    def __init__(self, shapes: Shapes) -> None:
        self.bytes = ITEM * sum(m * n for m, n in matrices_of(shapes))
        self._from, self._to = torch.zeros(2, self.bytes // ITEM).unbind(0)

    def __call__(self) -> None:
        """Copy it once."""
        self._to.copy_(self._from)


def limit(copy_seconds: float, products: Products) -> list[tuple[float, float]]:
    """Return the seconds of each stage that memory and that products take at least.

    Args:
        copy_seconds: of a `Copy`.
        products: that have been measured.
    """
    return [
        (
            stage.arrays * copy_seconds / 2,
            sum(products.seconds(kind) for kind in stage.products),
        )
        for stage in STAGES
    ]


def _ways(m: int, n: int, rank: int) -> Iterator[Sequence[Tensor]]:
    """Yield what may stand for a matrix of a model: itself, as many of its rows as lie
    in the cache, and as many such matrices as do; each with its thin factors row after
    row and column after column.
    """
    places = {(m, n), (min(m, max(1, IN_CACHE // n)), n)}
    if 2 * m * n <= IN_CACHE:
        places.add((IN_CACHE // (m * n), m, n))
    for place in sorted(places):
        a = torch.randn(place)
        p, q = torch.randn(*place[:-1], rank), torch.randn(*place[:-2], n, rank)
        yield a, p, q
        yield a, p.mT.contiguous().mT, q.mT.contiguous().mT


def _fastest(function: Callable[[], object]) -> float:
    """Return the least seconds of a call, of three at least."""
    best, spent, calls = float("inf"), 0.0, 0
    while spent < TRIALS_S or calls < 3:
        start = time.perf_counter()
        function()
        took = time.perf_counter() - start
        best, spent, calls = min(best, took), spent + took, calls + 1
    return best
