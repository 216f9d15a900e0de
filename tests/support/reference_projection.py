"""GaLore and GoLore in NumPy, as schemes of communication and as AdamW in the projected
space, written from the papers' descriptions. Nothing of the compressors is used; random
subspaces are made of the numbers of `randomness.gaussian`, which are part of what is
specified.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from lowrank_comm.numerics.randomness import gaussian
from tests.support.reference import Matrix, average


def on_rows(m: int, n: int, side: str) -> bool:
    return m < n if side == "short" else m > n


def orth(a: Matrix) -> Matrix:
    """Gram-Schmidt, twice."""
    columns: list[Matrix] = []
    for column in a.T:
        for _ in range(2):
            column = column - sum(
                (np.dot(other, column) * other for other in columns), np.zeros_like(column)
            )
        columns.append(column / np.linalg.norm(column))
    return np.stack(columns, axis=1)


def random_subspace(seed: int, name: str, t: int, s: int, r: int) -> Matrix:
    drawn = gaussian(seed, [name], t, "random P", (s, r), torch.float64, torch.device("cpu"))[0]
    return orth(drawn.numpy())


def singular_subspace(mean: Matrix, rows: bool, r: int) -> Matrix:
    u, _, vt = np.linalg.svd(mean, full_matrices=False)
    return u[:, :r] if rows else vt[:r].T


class Projection:
    """One matrix, N workers: the projector at each step, what is applied, what each
    worker keeps.

    rule: "galore", "golore", or "every step" (random projection). `galore_until`:
        GaLore's refreshes before that step.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        workers: int,
        rank: int,
        tau: int,
        rule: str,
        side: str = "short",
        galore_until: int = 0,
        feedback: bool = False,
        seed: int = 0,
    ) -> None:
        self.name = name
        self.rank = min(rank, *shape)
        self.tau = tau
        self.rule = rule
        self.seed = seed
        self.rows = on_rows(*shape, side)
        self.s = shape[0] if self.rows else shape[1]
        self.galore_until, self.feedback = galore_until, feedback
        self.errors = [np.zeros(shape) for _ in range(workers)]
        self.t = 0
        self.p: Matrix = np.zeros((self.s, self.rank))

    def refresh(self, mean: Matrix) -> None:
        if self.rule != "every step" and self.t % self.tau:
            return
        if self.rule == "galore" or self.t < self.galore_until:
            self.p = singular_subspace(mean, self.rows, self.rank)
        else:
            self.p = random_subspace(self.seed, self.name, self.t, self.s, self.rank)

    def project(self, a: Matrix) -> Matrix:
        """Orthogonal projection on the subspace."""
        return self.p @ (self.p.T @ a) if self.rows else (a @ self.p) @ self.p.T

    def step(self, gradients: Sequence[Matrix]) -> Matrix:
        deltas = [g + e for g, e in zip(gradients, self.errors, strict=True)]
        self.refresh(average(deltas))
        sent = [self.project(delta) for delta in deltas]
        if self.feedback:
            self.errors = [delta - s for delta, s in zip(deltas, sent, strict=True)]
        self.t += 1
        return average(sent)


class ProjectedAdam:
    """AdamW whose moments are kept in coordinates of the subspace; for a matrix W of
    shape (m, n), starting at W.
    """

    def __init__(
        self,
        w: Matrix,
        subspace: Projection,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        scale: float,
        second_moment: str,
    ) -> None:
        self.w, self.subspace, self.second_moment = w.copy(), subspace, second_moment
        self.lr = lr
        self.betas = betas
        self.eps = eps
        self.weight_decay = weight_decay
        self.scale = scale
        free = w.shape[1] if subspace.rows else w.shape[0]
        self.first, self.second = np.zeros((free, subspace.rank)), np.zeros((free, subspace.rank))
        self.t = self.t_second = 0

    def coordinates(self, mean: Matrix) -> Matrix:
        """(free dimension, r)."""
        return (mean.T if self.subspace.rows else mean) @ self.subspace.p

    def step(self, gradients: Sequence[Matrix]) -> None:
        mean, before = average(gradients), self.subspace.p
        self.subspace.refresh(mean)
        refreshed = self.subspace.t % self.subspace.tau == 0
        self.subspace.t += 1
        if refreshed and self.t > 0:
            overlap = before.T @ self.subspace.p
            self.first = self.first @ overlap
            if self.second_moment == "rotate":
                rest = 1.0 - (overlap**2).sum(axis=0)
                self.second = (
                    self.second @ overlap**2 + self.second.mean(axis=1, keepdims=True) * rest
                )
            elif self.second_moment == "reset":
                self.second, self.t_second = np.zeros_like(self.second), 0
        self.t, self.t_second = self.t + 1, self.t_second + 1
        r, (b1, b2) = self.coordinates(mean), self.betas
        self.first = b1 * self.first + (1 - b1) * r
        self.second = b2 * self.second + (1 - b2) * r**2
        direction = (self.first / (1 - b1**self.t)) / (
            np.sqrt(self.second / (1 - b2**self.t_second)) + self.eps
        )
        if self.t_second < self.t:
            direction *= min(1.0, self.t_second / 10)
        full = direction @ self.subspace.p.T
        update = self.scale * (full.T if self.subspace.rows else full)
        self.w = self.w - self.lr * update - self.lr * self.weight_decay * self.w
