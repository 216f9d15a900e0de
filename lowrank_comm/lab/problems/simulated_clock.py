"""Seconds on the simulated clock until a bidirectional method has found a stationary
point, and a search for its parameters.

    f(x) = 0.5 x^T A x - b^T x (+ the non-convex term)
    A: tridiagonal, eigenvalues in (0.008, 1.008);   b ~ 0.15 N(0, I)
    non-convex term: gradient 0.3 w (1 - w^2)/(1 + w^2)^2 in each coordinate,
        second derivative from -0.15 to 0.3 (at 0)
    gradient of worker i: grad f(w) + c_i + noise,
        noise ~ N(0, (sigma^2/d) I),   c_i that sum to 0 (linear tilts)

A run ends when the mean over some steps of the exact ||grad f(x)||^2 is at most eps.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lowrank_comm.bidirectional import BidirectionalSimulation, Clock, Method
from lowrank_comm.numerics.randomness import stream

DIVERGED = 1e6
"""||grad f(x)||^2 from which a run is given up."""
NON_CONVEX = 0.3
"""Factor of w (1 - w^2)/(1 + w^2)^2, the gradient of the non-convex term in each
coordinate.
"""


@dataclass(frozen=True)
class Objective:
    """The function f that is minimised, with its noise.

    Args:
        d: dimension.
        variance: sigma^2 of one stochastic gradient.
        non_convex: whether the non-convex term is there.
        tilt: standard deviation of the entries of c_i; 0 for homogeneous data.
        seed: of b and of c_i.
    """

    d: int
    variance: float
    non_convex: bool = False
    tilt: float = 0.0
    seed: int = 0

    @property
    def smoothness(self) -> float:
        """L: the largest eigenvalue of the Hessian anywhere, which it has at x = 0."""
        quadratic = 0.508 + 0.5 * math.cos(math.pi / (self.d + 1))
        return quadratic + (NON_CONVEX if self.non_convex else 0.0)

    def b(self) -> Tensor:
        """Draw b, (d,)."""
        return 0.15 * torch.randn(
            self.d, generator=stream(self.seed, "scaling", 0, "b"), dtype=torch.float64
        )

    def tilts(self, n: int) -> Tensor:
        """Draw c_i, (n, d), whose sum is 0."""
        drawn = torch.randn(
            n, self.d, generator=stream(self.seed, "scaling", 0, "tilts"), dtype=torch.float64
        )
        return self.tilt * (drawn - drawn.mean(dim=0))

    def gradient(self, w: Tensor, b: Tensor) -> Tensor:
        """Return grad f at each row of w, (n, d)."""
        result = 0.508 * w - b
        result[:, 1:] -= 0.25 * w[:, :-1]
        result[:, :-1] -= 0.25 * w[:, 1:]
        if self.non_convex:
            square = w.square()
            result += NON_CONVEX * w * (1 - square) / (1 + square).square()
        return result


@dataclass(frozen=True)
class Trial:
    """Outcome of one run until eps: seconds on the clock (infinite, if a limit came
    first), the last mean of ||grad f||^2, steps, and numbers carried on a link.
    """

    seconds: float
    residual: float
    steps: int
    up: int
    down: int


def seconds_to_target(
    objective: Objective,
    method: Method,
    n: int,
    *,
    batch: int,
    first_batch: int,
    gamma: float,
    h: float,
    kappa: float,
    eps: float,
    window: int,
    seed: int,
    limit: float,
    most_steps: int,
) -> Trial:
    """Run until the mean over `window` steps of the exact ||grad f(x)||^2 is at most
    eps, or a limit is reached.

    Args:
        objective: f, and the noise.
        method: of `lowrank_comm.bidirectional`.
        n: workers.
        batch, first_batch: gradients averaged by a worker in a step, and in the first.
        gamma: step size of the server's SGD.
        h, kappa: of the clock.
        eps, window: the target.
        seed: of noise and method.
        limit, most_steps: seconds and steps at which the run is given up.
    """
    clock, b, tilts = Clock(h, kappa), objective.b(), objective.tilts(n)
    x = torch.zeros(objective.d, dtype=torch.float64)
    simulation = BidirectionalSimulation(method, x, n, gamma=gamma, seed=seed, clock=clock)
    generator = stream(seed, "scaling", 0, "noise")
    recent: list[float] = []
    residual = math.inf
    while clock.seconds < limit and simulation.t < most_steps:
        size = first_batch if simulation.t == 0 else batch
        # in float32, which is drawn four times as fast
        noise = torch.randn(n, objective.d, generator=generator)
        gradients = objective.gradient(simulation.points, b).add_(tilts)
        gradients.add_(noise, alpha=math.sqrt(objective.variance / (objective.d * size)))
        if not simulation.step(gradients, size):
            break
        recent.append(float(objective.gradient(simulation.x[None], b).square().sum()))
        residual = sum(recent[-window:]) / min(window, len(recent))
        if residual > DIVERGED:
            # the earlier, the worse
            residual = DIVERGED * (1 + most_steps - simulation.t)
            break
        if len(recent) >= window and residual <= eps:
            return Trial(
                clock.seconds, residual, simulation.t, simulation.ledger.up, simulation.ledger.down
            )
    return Trial(math.inf, residual, simulation.t, simulation.ledger.up, simulation.ledger.down)


Choice = dict[str, Any]
"""Parameter name -> a value of its grid."""


@dataclass(frozen=True)
class Search:
    """What a search found: the best choice, its cost, the number of trials, and whether
    the cap on trials ended the search.
    """

    chosen: Choice
    cost: float
    trials: int
    capped: bool


def descend_on_grid(
    grid: Mapping[str, Sequence[Any]],
    start: Choice,
    cost: Callable[[Choice, float], float],
    most: int,
) -> Search:
    """Search the grid locally: move one parameter to a neighbour while that lowers the
    cost, and two at a time where no single one moves (a larger step size may need a
    larger batch to help).

    Args:
        grid: parameter name -> values in order.
        start: where to begin.
        cost: of a choice, given the best so far, above which it may give up and return
            infinity. Among choices that never reach the target, those that come nearer
            should cost less, so that a search that begins there finds its way out.
        most: evaluations at most.
    """
    known: dict[tuple[int, ...], float] = {}
    names = list(grid)
    here = tuple(list(grid[name]).index(start[name]) for name in names)
    best = math.inf

    def at(place: tuple[int, ...]) -> float:
        if place not in known:
            known[place] = cost(
                {name: grid[name][k] for name, k in zip(names, place, strict=True)}, best
            )
        return known[place]

    def walk(move: tuple[int, ...]) -> bool:
        nonlocal here, best
        start = here
        while len(known) < most:
            there = tuple(k + by for k, by in zip(here, move, strict=True))
            if (
                any(not 0 <= k < len(grid[name]) for k, name in zip(there, names, strict=True))
                or at(there) >= best
            ):
                break
            here, best = there, at(there)
        return here != start

    best = at(here)
    moves = sorted(
        (
            move
            for move in itertools.product((0, 1, -1), repeat=len(names))
            if 1 <= sum(map(abs, move)) <= 2
        ),
        key=lambda move: sum(map(abs, move)),
    )
    singles = [move for move in moves if sum(map(abs, move)) == 1]
    while len(known) < most and (sum(map(walk, singles)) or any(map(walk, moves))):
        pass
    return Search(
        {name: grid[name][k] for name, k in zip(names, here, strict=True)},
        best,
        len(known),
        len(known) >= most,
    )
