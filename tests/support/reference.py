"""Algorithms 1 and 2 of "From PowerSGD to PowerSGD+" in NumPy, written from the paper's
text. Nothing of `lowrank_comm` is used here.

Symbols are the paper's: N workers, Delta_i = g_i + e_i (m x n), basis Q (n x r), P
orthonormal (m x r), restart period tau, step t from 0. Also the seeded problems that
several test files share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


@dataclass
class Compressed:
    """What Algorithm 1 returns: the next basis, what each worker sent (P Q_i^T), and
    what all apply (P Q^T).
    """

    basis: Matrix
    sent: list[Matrix]
    applied: Matrix


def average(matrices: Sequence[Matrix]) -> Matrix:
    return sum(matrices[1:], matrices[0]) / len(matrices)


def _project(p: Matrix, deltas: Sequence[Matrix]) -> Compressed:
    """The second half, which SSP-Comp and SVD-Comp share: Q_i = Delta_i^T P, Q = mean
    Q_i.
    """
    own = [delta.T @ p for delta in deltas]
    q = average(own)
    return Compressed(q, [p @ q_own.T for q_own in own], p @ q.T)


def ssp_comp(basis: Matrix, deltas: Sequence[Matrix]) -> Compressed:
    """Single-step power iteration."""
    p, _ = np.linalg.qr(average([delta @ basis for delta in deltas]))
    return _project(p, deltas)


def svd_comp(rank: int, deltas: Sequence[Matrix]) -> Compressed:
    """The optimal rank-r compressor of the mean: the first r left singular vectors."""
    u, _, _ = np.linalg.svd(average(deltas), full_matrices=False)
    return _project(u[:, :rank], deltas)


class Reference:
    """Algorithm 2 for one matrix and N workers. `restart_every=None` is PowerSGD, a
    number is PowerSGD+'s tau.

    A tensor of more than two dimensions is seen as (shape[0], -1). The rank is cut to
    min(m, n).
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        workers: int,
        rank: int,
        basis: Matrix | None = None,
        restart_every: int | None = None,
    ) -> None:
        self.shape = shape
        self.matrix_shape = (shape[0], int(np.prod(shape[1:])))
        self.rank = min(rank, *self.matrix_shape)
        self.basis = None if basis is None else basis[:, : self.rank]
        self.restart_every = restart_every
        self.t = 0
        self.errors = [np.zeros(shape) for _ in range(workers)]
        self.sent: list[Matrix] = []

    def step(self, gradients: Sequence[Matrix]) -> Matrix:
        """One step: all workers' gradients in, the applied update out; `errors` and
        `sent` are of this step afterwards.
        """
        deltas = [
            (g + e).reshape(self.matrix_shape) for g, e in zip(gradients, self.errors, strict=True)
        ]
        if self.restart_every is not None and self.t % self.restart_every == 0:
            result = svd_comp(self.rank, deltas)
        else:
            assert self.basis is not None, "PowerSGD needs Q_{-1}"
            result = ssp_comp(self.basis, deltas)
        self.basis = result.basis
        self.sent = [sent.reshape(self.shape) for sent in result.sent]
        self.errors = [
            (d - s).reshape(self.shape) for d, s in zip(deltas, result.sent, strict=True)
        ]
        self.t += 1
        return result.applied.reshape(self.shape)


# --- seeded problems ---


def gradient(shape: tuple[int, ...], step: int, worker: int, seed: int = 0) -> Matrix:
    """A gradient of one worker at one step: a part that all workers share, and one of
    its own (heterogeneous data and noise).
    """
    common = np.random.default_rng((seed, step, 0)).standard_normal(shape)
    own = np.random.default_rng((seed, step, worker + 1)).standard_normal(shape)
    return np.asarray(common + 0.7 * own)


def gradients(
    shapes: Mapping[str, tuple[int, ...]], step: int, worker: int, seed: int = 0
) -> dict[str, Matrix]:
    """`gradient` for every named shape, each from a seed of its own."""
    return {
        name: gradient(shape, step, worker, 1000 * seed + k)
        for k, (name, shape) in enumerate(shapes.items())
    }


def initial_basis(
    shapes: Mapping[str, tuple[int, ...]], rank: int, seed: int = 0
) -> dict[str, Matrix]:
    """Q_{-1} for every matrix: n x min(rank, m, n)."""
    bases = {}
    for k, (name, shape) in enumerate(shapes.items()):
        m, n = shape[0], int(np.prod(shape[1:]))
        bases[name] = np.random.default_rng((seed, 77, k)).standard_normal((n, min(rank, m, n)))
    return bases


def spectrum_matrix(m: int, n: int, singular_values: Matrix, seed: int = 0) -> Matrix:
    """A matrix with the given singular values and random singular vectors."""
    generator = np.random.default_rng(seed)
    u, _ = np.linalg.qr(generator.standard_normal((m, len(singular_values))))
    v, _ = np.linalg.qr(generator.standard_normal((n, len(singular_values))))
    return np.asarray((u * singular_values) @ v.T)
