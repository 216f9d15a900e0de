"""PowerSGD: a single step of power iteration between two averages (SSP-Comp).

Source: Algorithm 1 of PowerSGD+ (Xie, Chen, Yuan; arXiv 2509.11254), after PowerSGD
(Vogels et al.; arXiv 1905.13727).

    P_i = Delta_i Q                  m x r
    P   = mean of P_i;  P~ = orth(P)
    Q_i = Delta_i^T P~               n x r
    Q   = mean of Q_i                kept as the next step's Q (warm start)
    applied = P~ Q^T = P~ P~^T mean(Delta),   sent_i = P~ Q_i^T,   e_i <- Delta_i - sent_i

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

With `power_iterations=k` the four lines are repeated k times on the same Delta, each
from the last one's mean Q; only the last Q_i is sent in the sense of the error memory.
An iteration never captures less than the one before it.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from lowrank_comm.compressors.base import (
    Compressor,
    Context,
    Delta,
    LowRank,
    Result,
    State,
    Steps,
    checked_positive_int,
)
from lowrank_comm.compressors.requests import Decide, Mean, Request, SumOverRows, WholeRows
from lowrank_comm.numerics.linalg import (
    cholesky_qr,
    least_pivot,
    orthonormal_rank_revealing,
    safe_pivot,
)


@dataclass(frozen=True)
class PowerSGD(Compressor):
    """Rank-r gradient compression by single-step power iteration with warm start and
    error feedback.

    applied = P~ P~^T mean(Delta_i) with P~ = orth(mean(Delta_i) Q)

    Args:
        rank: r >= 1; cut to min(m, n) matrix by matrix. A matrix costs k r (m + n)
            elements a step.
        power_iterations: k >= 1, iterations in a step, of two collectives each; 1 is
            the papers' algorithm.

    Raises:
        ConfigError: a value is not an integer of at least 1.

    Example:
        >>> from lowrank_comm import PowerSGD
        >>> PowerSGD(rank=2).elements(m=100, n=50, r=2)
        300

    Source: Algorithm 1 (SSP-Comp) of arXiv 2509.11254; several iterations as in section
    4.2 of arXiv 1905.13727.
    """

    power_iterations: int = field(default=1, kw_only=True)

    json_name: ClassVar[str] = "powersgd"
    row_blocks: ClassVar[bool] = True
    projects: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_positive_int(type(self).__name__, "power_iterations", self.power_iterations)

    def elements(self, m: int, n: int, r: int) -> int:
        return self.power_iterations * r * (m + n)

    def initial_state(self, context: Context, m: int, n: int, like: Tensor) -> State:
        return {"Q": context.draw("initial Q", (n, context.rank), like)}

    def step(self, delta: Delta, state: State, context: Context) -> Steps:
        return (yield from ssp_comp(delta, state["Q"], context, iterations=self.power_iterations))


def ssp_comp(
    delta: Delta, q: Tensor, context: Context, kind: str = "factors", iterations: int = 1
) -> Steps:
    """SSP-Comp of Algorithm 1 on a batch, `iterations` times on the same Delta. delta:
    (B, m, n), q: (B, n, r). Two averages and r (m + n) elements a matrix for each
    iteration.
    """
    for k in range(1, iterations):
        purpose = f" of iteration {k}"
        _, q_mean, _ = yield from power_iteration(delta, q, context, kind, purpose)
        q = yield from next_q(q_mean, context, purpose)
    p, q_mean, q_own = yield from power_iteration(delta, q, context, kind)
    return Result(
        applied=LowRank(p, q_mean),
        sent=LowRank(p, q_own),
        state={"Q": (yield from next_q(q_mean, context))},
    )


def power_iteration(
    delta: Delta, q: Tensor, context: Context, kind: str, purpose: str = ""
) -> Generator[Request, Any, tuple[Tensor, Tensor, Tensor]]:
    """P~, mean Q and own Q of one power iteration; `purpose` tells the draws of several
    iterations of one step apart.
    """
    p_mean, _ = yield Mean(delta.times(q), kind)
    p = yield from orthonormal(p_mean, context, f"fill P{purpose}")
    q_mean, q_own = yield Mean(delta.transposed_times(p), kind, over_rows=True)
    return p, q_mean, q_own


def next_q(q_mean: Tensor, context: Context, purpose: str = "") -> Generator[Request, Any, Tensor]:
    """Basis of range(mean Q) for the next power iteration, its dead columns redrawn
    from (seed, name, t).
    """
    return (
        yield from orthonormal(q_mean, context, f"redraw Q{purpose}", passes=1, in_blocks=False)
    )


def orthonormal(
    a: Tensor, context: Context, purpose: str, passes: int = 2, in_blocks: bool = True
) -> Generator[Request, Any, Tensor]:
    """orth(a) for averaged a (B, rows, r): Cholesky-QR; again in float64 where columns
    are nearly dependent; column by column, with random vectors for the dead ones, where
    they are dependent. Each matrix gets what it would get alone.

    `in_blocks`: this rank may hold a block of the rows only, as of P. The r x r Gram
    matrices are then summed over the blocks; in the last case all rows of `a` are
    fetched.
    """
    basis, pivot = yield from _cholesky_qr(a, passes, in_blocks)
    safe = pivot > safe_pivot(a.dtype)
    if (yield Decide(safe)):
        return basis
    unsafe = (~safe).nonzero().flatten()
    wide, pivot = yield from _cholesky_qr(a[unsafe].double(), 2, in_blocks)
    basis[unsafe] = wide.to(a.dtype)
    good = pivot > least_pivot(a.dtype)
    if (yield Decide(good)):
        return basis
    dead = unsafe[~good]
    whole = (yield WholeRows(a[dead], context.m)) if in_blocks else a[dead]
    fill = context.only(dead.tolist()).draw(purpose, tuple(whole.shape[-2:]), a)
    basis[dead] = orthonormal_rank_revealing(whole, fill)[
        :, context.rows if in_blocks else slice(None)
    ]
    return basis


def _cholesky_qr(
    a: Tensor, passes: int, in_blocks: bool
) -> Generator[Request, Any, tuple[Tensor, Tensor]]:
    """`cholesky_qr`, with the Gram matrices of all rows."""
    steps = cholesky_qr(a, passes)
    gram = next(steps)
    while True:
        try:
            gram = steps.send((yield SumOverRows(gram)) if in_blocks else gram)
        except StopIteration as end:
            result: tuple[Tensor, Tensor] = end.value
            return result
