"""PowerSGD+: PowerSGD whose subspace is computed anew every tau steps, so that it cannot stay trapped.

Source: Algorithm 2 of PowerSGD+ (Xie, Chen, Yuan; arXiv 2509.11254). Where t mod tau == 0, t from 0, SVD-Comp of its
Algorithm 1 takes the place of SSP-Comp:

    D  = mean of Delta_i                         the whole matrix is on the wire: m n elements
    P~ = U[:, :r] of D = U S V^T                 computed on one worker and broadcast: m r elements
    Q  = D^T P~                                  the paper averages Q_i = Delta_i^T P~; the mean is the same number,
                                                 and D is known already, so nothing more is sent
    applied = P~ Q^T,   sent_i = P~ (Delta_i^T P~)^T

P~ is broadcast since equal input does not give equal singular vectors bit by bit (another number of threads is enough).

`restart="randomized"` needs no whole matrix: SSP-Comp from a fresh Gaussian Q captures at least r/n of the energy in
expectation, the constant delta of Lemma 2, so Theorem 2 holds for it (Remark 2); one more power iteration, which never
captures less, brings it near to the SVD. 2 r (m + n) elements.

Two options of the SVD restart, both free of further bytes because D is on the wire anyway:
`exact_restart`: apply all of D and clear the error memory, instead of keeping the residual.
`consensus_restart`: every worker keeps the mean residual D - P~ Q^T. The trajectory stays the same (only the mean error
matters), while the workers' errors, which drift apart when their data differ, meet again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..errors import ConfigError
from ..linalg import leading_left_singular_vectors, orthonormal_rank_revealing
from ..restart import RestartSchedule, staggered
from .base import (
    ComputeOnce,
    Context,
    Delta,
    LowRank,
    Mean,
    Result,
    State,
    Steps,
    SumOverRows,
    WholeRows,
    checked_positive_int,
    transposed_product,
)
from .powersgd import PowerSGD, next_q, power_iteration, ssp_comp

RESTARTS = ("svd", "randomized")


@dataclass(frozen=True)
class PowerSGDPlus(PowerSGD):
    """PowerSGD with a restart of the subspace every tau steps.

    t mod tau != 0: SSP-Comp as PowerSGD;  t mod tau == 0: P~ from the mean of Delta itself

    Args:
        rank: r >= 1; cut to min(m, n) matrix by matrix.
        restart_every: tau in steps, >= 1; the first step (t = 0) is a restart.
        restart: "svd" (the paper's rule, m n + m r elements) or "randomized" (2 r (m + n) elements).
        exact_restart: apply the whole mean at an SVD restart and clear the error memory.
        consensus_restart: set every worker's error to the mean residual at an SVD restart.
        stagger: spread the restarts of the matrices over the period (all restart at t = 0).

    Raises:
        ConfigError: a value is out of range, or options contradict one another.

    Example:
        >>> from lowrank_comm import PowerSGDPlus
        >>> PowerSGDPlus(rank=4, restart_every=200).restart_elements(m=100, n=50, r=4)
        5400

    Source: Algorithms 1 and 2, Theorem 2 and Remark 2 of arXiv 2509.11254.
    """

    restart_every: int = 200
    restart: str = "svd"
    exact_restart: bool = False
    consensus_restart: bool = False
    stagger: bool = False

    json_name: ClassVar[str] = "powersgd_plus"

    def __post_init__(self) -> None:
        super().__post_init__()
        checked_positive_int("PowerSGDPlus", "restart_every", self.restart_every)
        if self.restart not in RESTARTS:
            raise ConfigError(
                f"PowerSGDPlus: restart={self.restart!r} is unknown; choose one of {', '.join(map(repr, RESTARTS))}."
            )
        for key in ("exact_restart", "consensus_restart", "stagger"):
            if not isinstance(getattr(self, key), bool):
                raise ConfigError(f"PowerSGDPlus: {key} must be True or False, got {getattr(self, key)!r}.")
        for key in ("exact_restart", "consensus_restart"):
            if getattr(self, key) and self.restart != "svd":
                raise ConfigError(
                    f'PowerSGDPlus: {key}=True needs the mean of Delta on the wire, which restart="{self.restart}" '
                    f'does not send; use restart="svd", or leave {key} out.'
                )
        if self.exact_restart and self.consensus_restart:
            raise ConfigError(
                "PowerSGDPlus: exact_restart=True clears the error memory on every worker, so consensus_restart=True "
                "has nothing to do; leave one of the two out."
            )

    def restart_elements(self, m: int, n: int, r: int) -> int:
        return m * n + m * r if self.restart == "svd" else 2 * r * (m + n)

    def schedule(self, costs: dict[str, int]) -> RestartSchedule:
        return staggered(self.restart_every, costs) if self.stagger else RestartSchedule(self.restart_every)

    def step(self, delta: Delta, state: State, context: Context) -> Steps:
        if not context.restart:
            return (yield from ssp_comp(delta, state["Q"], context))
        if self.restart == "svd":
            return (yield from self._svd_comp(delta, context))
        return (yield from _randomized_comp(delta, context))

    def _svd_comp(self, delta: Delta, context: Context) -> Steps:
        """SVD-Comp of Algorithm 1, with P~ from one worker and Q from the mean that all have."""
        r = context.rank
        d, own = yield Mean(delta.tensor, "restart")
        p = yield ComputeOnce(d, context.m, r, lambda matrices: leading_left_singular_vectors(matrices, r))
        if context.wire_rounds:  # a basis that was rounded on the wire is orthonormal no more
            whole = yield WholeRows(p, context.m)
            fill = context.draw("fill P", (whole.shape[1], r), p)
            p = orthonormal_rank_revealing(whole, fill)[:, context.rows]
        q = yield SumOverRows(transposed_product(d, p))
        q_next = yield from next_q(q, context)
        applied = LowRank(p, q)
        if self.exact_restart:
            return Result(applied=d, sent=own, state={"Q": q_next})
        sent = LowRank(p, (yield SumOverRows(transposed_product(own, p))))
        if self.consensus_restart:
            # delta - own is what the wire's rounding took from this worker alone; it stays with this worker.
            return Result(applied, sent, {"Q": q_next}, kept=(delta.tensor - own) + (d - applied.dense()))
        return Result(applied, sent, {"Q": q_next})


def _randomized_comp(delta: Delta, context: Context) -> Steps:
    """SSP-Comp from a fresh Gaussian Q, with one extra power iteration before it. 2 r (m + n) elements a matrix."""
    fresh = context.draw("restart Q", (delta.tensor.shape[-1], context.rank), delta.tensor)
    purpose = " of the extra iteration"
    _, q_mean, _ = yield from power_iteration(delta, fresh, context, "restart", purpose)
    q = yield from next_q(q_mean, context, purpose)
    return (yield from ssp_comp(delta, q, context, "restart"))
