"""The problem of Theorem 1 (arXiv 2509.11254), on which PowerSGD never learns and
PowerSGD+ does.

f(X) = psi(D^T X D), psi(x) = x^2 for |x| <= 1 and 2|x| - 1 beyond, with the gradient
oracle g_i = G + xi_i (sigma B - G), G = psi'(D^T X D) D D^T the true gradient, B all
ones, xi_i = +1 or -1 by a fair coin, rank 1. If all coins of the first step show +1
(probability 2^-N, and the case that is trained here), the first Delta is sigma B, the
subspace is span(1, ..., 1), and D is orthogonal to it: no later step sees G, and it
piles up in the error memory unseen.

What is exact. In floating point, round-off in the subspace grows with the error memory
and may free PowerSGD after some 10 to 20 steps. On the paper's 2 x 2 matrices
(`block=1`) both entries of the basis are rounded alike, which keeps the trap shut where
products and sums are rounded one by one; in rotated coordinates (`rotation`), which
change nothing in the theorem, they are not. With `block=2` every entry of the paper's
example is repeated in a 2 x 2 block (X is 4 x 4, D = (1, 1, -1, -1)), so that the basis
is (1, 1, 1, 1) / 2; with sigma = 3 and N = 3 all of PowerSGD's numbers are integers or
halves far below 2^53, and its float64 arithmetic *is* exact arithmetic: every applied
update is a multiple of B, bit by bit. Not exact: the optimizer's own step on X (its
rounding moves D^T X D by about 1e-13, and psi' does not change), and all of PowerSGD+,
which needs no exactness to escape. N is odd because with an even N the coins may
cancel, P is 0 then, and the random vector that takes its place opens the trap; the
paper's proof passes over this case.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lowrank_comm.lab.training.averaging import Crew
from lowrank_comm.numerics.randomness import stream

OptimizerOf = Callable[[Iterable[Tensor]], torch.optim.Optimizer]


@dataclass(frozen=True)
class Problem:
    """The problem at one size.

    Args:
        block: each entry of the paper's 2 x 2 matrices is repeated in a block x block
            square.
        workers: N.
        sigma: of the noise.
        dtype: of everything.
        rotation: seed of an orthogonal R; the problem is then that of R X R^T. None for
            the paper's coordinates.
    """

    block: int = 2
    workers: int = 3
    sigma: float = 3.0
    dtype: torch.dtype = torch.float64
    rotation: int | None = None

    @cached_property
    def d(self) -> Tensor:
        """The vector D of f, (2 block,)."""
        return self._turned(
            torch.tensor([1.0, -1.0], dtype=torch.float64).repeat_interleave(self.block)
        )

    @cached_property
    def a(self) -> Tensor:
        """The direction of every gradient, A = D D^T."""
        return torch.outer(self.d, self.d)

    @cached_property
    def b(self) -> Tensor:
        """The noise matrix B, which is all ones before the rotation."""
        ones = self._turned(torch.ones(2 * self.block, dtype=torch.float64))
        return torch.outer(ones, ones)

    @property
    def start(self) -> Tensor:
        """The start X_0, a multiple of A with D^T X_0 D = 2, so that f = 3 and
        psi' = 2.
        """
        return 2 * self.a / self.a.numel()

    def _turned(self, vector: Tensor) -> Tensor:
        """Return R times a vector."""
        if self.rotation is not None:
            size = len(vector)
            generator = stream(self.rotation, "X", -1, "rotation")
            normal = torch.randn(size, size, generator=generator, dtype=torch.float64)
            vector = torch.linalg.qr(normal)[0] @ vector
        return vector.to(self.dtype)

    def functional(self, x: Tensor) -> float:
        """Return D^T X D, of which f is a function."""
        return float(self.d @ x @ self.d)

    def loss_and_slope(self, x: Tensor) -> tuple[float, float]:
        """Return psi(D^T X D) and psi' there."""
        value = self.functional(x)
        if abs(value) <= 1:
            return value * value, 2 * value
        return 2 * abs(value) - 1, math.copysign(2.0, value)

    def coins(self, steps: int, seed: int) -> Tensor:
        """Return xi, (steps, N) of +1 and -1; all +1 at the first step, as in the
        theorem.
        """
        xi = torch.randint(0, 2, (steps, self.workers), generator=stream(seed, "X", -1, "coins"))
        xi[0] = 1
        return (2 * xi - 1).to(self.dtype)


@dataclass
class Run:
    """One training run.

    Attributes:
        problem: what was trained on.
        values: D^T X_t D before each step, and after the last.
        losses: f(X_t) likewise.
        squared_gradients: ||grad f(X_t)||^2 likewise.
        updates: what the compressor applied at each step.
    """

    problem: Problem
    values: list[float]
    losses: list[float]
    squared_gradients: list[float]
    updates: list[Tensor]

    @property
    def trapped_exactly(self) -> bool:
        """Whether every update was a multiple of B to the last bit, so that no part of
        the gradient, a multiple of A, came through.
        """
        return all(torch.equal(update, update[0, 0] * self.problem.b) for update in self.updates)

    def first_visible(self, change: float) -> int | None:
        """Return the first t at which D^T X_t D differs from its start by more than
        `change`; None if it never does.
        """
        moved = (abs(value - self.values[0]) > change for value in self.values)
        return next((t for t, visible in enumerate(moved) if visible), None)


def train(
    problem: Problem,
    section: Mapping[str, Any],
    optimizer_of: OptimizerOf,
    steps: int,
    seed: int = 0,
    first_basis: Sequence[float] | None = None,
    rate_at: Callable[[int], float] = lambda t: 1.0,
) -> Run:
    """Train for `steps` steps from X_0 by N simulated workers.

    Args:
        problem: at one size.
        section: the compressor, as in a configuration file.
        optimizer_of: makes the base optimizer.
        seed: of the coins.
        first_basis: Q_{-1}, whose sum is not 0; (1, 0, ..., 0) if not given.
        rate_at: t -> factor of the learning rate.
    """
    size = len(problem.d)
    basis = torch.tensor(first_basis or [1.0] + [0.0] * (size - 1), dtype=problem.dtype)[:, None]
    averager = Crew(problem.workers).averager(
        section, {"X": (size, size)}, problem.dtype, {"X": basis}
    )
    x = torch.nn.Parameter(problem.start)
    optimizer = optimizer_of([x])
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_at)
    run = Run(problem, [], [], [], [])

    def record() -> Tensor:
        loss, slope = problem.loss_and_slope(x.detach())
        gradient = slope * problem.a
        run.values.append(problem.functional(x.detach()))
        run.losses.append(loss)
        run.squared_gradients.append(float((gradient**2).sum()))
        return gradient

    for xi in problem.coins(steps, seed):
        gradient = record()
        noisy = [{"X": gradient + coin * (problem.sigma * problem.b - gradient)} for coin in xi]
        x.grad = averager.average(noisy)["X"]
        run.updates.append(x.grad.clone())
        optimizer.step()
        schedule.step()
    record()
    return run
