"""PowerSGD: a single step of power iteration between two averages (SSP-Comp).

Source: Algorithm 1 of PowerSGD+ (Xie, Chen, Yuan; arXiv 2509.11254), after PowerSGD
(Vogels et al.; arXiv 1905.13727).

    P_i = Delta_i Q                  m x r
    P   = mean of P_i,  P~ = orth(P)
    Q_i = Delta_i^T P~               n x r
    Q   = mean of Q_i                kept as the next step's Q (warm start)
    applied = P~ Q^T = P~ P~^T mean(Delta)
    sent_i  = P~ Q_i^T,  e_i <- Delta_i - sent_i

The error memory subtracts this worker's own Q_i, as the paper does, and not the
averaged Q, as public implementations do. The means over the workers are equal, hence
the training; but with the averaged Q the workers' errors part from one another without
bound.

Two things the paper leaves open. Q is orthonormalised before it is used again:
range(Delta Q), hence P~ and the result, are the same in exact arithmetic, but Delta Q
has the condition of Delta instead of its square, which in float32 decides whether small
singular values are seen at all. And dead columns (zero, or dependent on the others) are
replaced by random vectors from (seed, name, t): in P, where the mean of Delta Q has
less than full rank, and in Q, where a zero column would stay zero for ever and cost
rank.

With `power_iterations=k` the first four lines are repeated k times on the same Delta,
each time from the mean Q before; only the last Q_i is sent in the sense of the error
memory. An iteration never captures less than the one before it.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from lowrank_comm.compressors.base import (
    Compressor,
    Context,
    Delta,
    LowRank,
    Result,
    State,
    Steps,
)
from lowrank_comm.compressors.requests import Mean, Request
from lowrank_comm.compressors.subspaces import orthonormal
from lowrank_comm.options import PositiveInt


@dataclass(frozen=True)
class PowerSGD(Compressor):
    """Rank-r gradient compression by single-step power iteration with warm start and
    error feedback.

    applied = P~ P~^T mean(Delta_i) with P~ = orth(mean(Delta_i) Q)

    Args:
        rank: r; cut to min(m, n) matrix by matrix. A matrix costs k r (m + n)
            elements a step.
        power_iterations: k, iterations in a step, of two collectives and r (m + n)
            elements each; 1 is the papers' algorithm.

    Raises:
        ConfigError: a value is out of range.

    Example:
        >>> from lowrank_comm import PowerSGD
        >>> PowerSGD(rank=2).elements(m=100, n=50, r=2)
        300

    Source: Algorithm 1 (SSP-Comp) of arXiv 2509.11254; several iterations as in section
    4.2 of arXiv 1905.13727.
    """

    power_iterations: PositiveInt = field(default=1, kw_only=True)

    json_name = "powersgd"
    row_blocks = True
    projects = True
    follows_means = True

    def elements(self, m: int, n: int, r: int) -> int:
        return self.power_iterations * r * (m + n)

    def initial_state(self, context: Context, m: int, n: int, like: Tensor) -> State:
        return {"Q": context.draw("initial Q", (n, context.rank), like)}

    def step(self, delta: Delta, state: State, context: Context) -> Steps:
        return ssp_comp(delta, state["Q"], context, iterations=self.power_iterations)


def ssp_comp(
    delta: Delta, q: Tensor, context: Context, kind: str = "factors", iterations: int = 1
) -> Steps:
    """Run SSP-Comp of Algorithm 1 on a batch, `iterations` times on the same Delta.

    Two averages and r (m + n) elements a matrix for each iteration.

    Args:
        delta: (B, m, n), or the rows of it that this rank holds.
        q: (B, n, r).
        context: of the batch.
        kind: of the ledger.
        iterations: k >= 1.
    """
    for k in range(1, iterations + 1):
        purpose = f" of iteration {k}" if k < iterations else ""
        # of the answer only the mean is held, and no longer than it is needed
        p = yield from orthonormal(
            (yield Mean(delta.times(q), kind))[0], context, f"fill P{purpose}"
        )
        q_mean, q_own = yield Mean(delta.transposed_times(p), kind, over_rows=True)
        q = yield from next_q(q_mean, context, purpose)
    return Result(applied=LowRank(p, q_mean), sent=LowRank(p, q_own), state={"Q": q})


def next_q(q_mean: Tensor, context: Context, purpose: str = "") -> Generator[Request, Any, Tensor]:
    """Return a basis of range(mean Q) for the next power iteration, its dead columns
    redrawn from (seed, name, t).
    """
    return orthonormal(q_mean, context, f"redraw Q{purpose}", passes=1, in_blocks=False)
