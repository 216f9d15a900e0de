"""ACP: PowerSGD with alternating factors, one collective a step.

Source: ACP-SGD (Zhang, Zhang, Shi, Chu, Li: "Evaluation and Optimization of Gradient
Compression for Distributed Deep Learning", ICDCS 2023), whose text was not at hand; the
algorithm below is half a power iteration a step, with the error memory of PowerSGD+
(arXiv 2509.11254). With k the number of steps in which some worker had a gradient for
the matrix, counted from its last restart (k = 0), or from t = -1 in a run without
restarts, whose first Q is Gaussian:

    k odd:   P_i = Delta_i Q~               P = mean of P_i
             applied = P Q~^T               sent_i = P_i Q~^T         P~ <- orth(P)
    k even:  Q_i = Delta_i^T P~             Q = mean of Q_i
             applied = P~ Q^T               sent_i = P~ Q_i^T         Q~ <- orth(Q)

This sends half of PowerSGD's elements a step, and the basis is known before the
backward pass begins; the price is that it comes from the last step's Delta. Every step
is a projection (Lemma 1 of PowerSGD+, for either side). Lemma 2 needs restarts: at
t mod tau == 0 one of PowerSGD+'s restarts, "randomized" or "svd", gives both factors.

Where r = min(m, n), every step projects on the short side, on which the basis is the
whole space: exact, as every compressor is at full rank. Matrices in blocks of rows are
refused: P is kept from step to step, and a checkpoint would hold one block of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

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
from lowrank_comm.compressors.powersgd_plus import randomized_comp, svd_comp
from lowrank_comm.compressors.requests import Mean
from lowrank_comm.compressors.restart_schedule import RestartHistory
from lowrank_comm.compressors.subspaces import orthonormal
from lowrank_comm.errors import ConfigError
from lowrank_comm.numerics.linalg import orthonormal_rank_revealing
from lowrank_comm.options import Advice, PositiveInt


@dataclass(frozen=True)
class Acp(Compressor):
    """Alternating low-rank compression: P and Q take turns.

    applied = mean(Delta_i) Q~ Q~^T or P~ P~^T mean(Delta_i), with the orthonormal
    factor of the step before

    Args:
        rank: r; cut to min(m, n) matrix by matrix. A matrix costs r m and r n
            elements in turn.
        restart_every: tau in steps, the first step (t = 0) is a restart; null for no
            restarts.
        restart: "randomized" (2 r (m + n) elements) or "svd" (m n + m r).

    Raises:
        ConfigError: a value is out of range.

    Example:
        >>> from lowrank_comm import Acp
        >>> acp = Acp(rank=2)
        >>> acp.elements(m=100, n=50, r=2)
        150
        >>> acp.elements_in(m=100, n=50, r=2, variant=0, restart=False)
        200

    Source: see the module's text; restarts of arXiv 2509.11254.
    """

    restart_every: Annotated[
        PositiveInt | None, Advice("leave it out for no restarts", when=lambda value: value == 0)
    ] = None
    restart: Literal["randomized", "svd"] = "randomized"

    json_name = "acp"
    follows_means = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.restart != "randomized" and self.restart_every is None:
            raise ConfigError(
                f"Acp: restart={self.restart!r} has no effect without restart_every; give both,"
                " e.g. restart_every=200."
            )

    def elements(self, m: int, n: int, r: int) -> int:
        """Return the mean of two steps, rounded up; see `elements_in` for each."""
        return r * max(m, n) if r == min(m, n) else -(-r * (m + n) // 2)

    def variant(self, history: RestartHistory, restart: bool) -> int:
        return 0 if restart else history.age % 2

    def elements_in(self, m: int, n: int, r: int, variant: int, restart: bool) -> int:
        if restart:
            return self.restart_elements(m, n, r)
        return r * m if _projects_on_q(m, n, r, variant) else r * n

    def restart_elements(self, m: int, n: int, r: int) -> int:
        if self.restart_every is None:
            return self.elements(m, n, r)
        return m * n + m * r if self.restart == "svd" else 2 * r * (m + n)

    def initial_state(self, context: Context, m: int, n: int, like: Tensor) -> State:
        state = {}
        for symbol, rows in (("P", m), ("Q", n)):
            drawn = context.draw(f"initial {symbol}", (rows, context.rank), like)
            state[symbol] = orthonormal_rank_revealing(drawn, drawn)
        return state

    def step(self, delta: Delta, state: State, context: Context) -> Steps:
        if context.restart:
            return (yield from self._restarted(delta, context))
        p, q = state["P"], state["Q"]
        _, m, n = delta.shape
        if _projects_on_q(m, n, context.rank, context.variant):
            mean, own = yield Mean(delta.times(q))
            following = yield from orthonormal(mean, context, "fill P", in_blocks=False)
            return Result(LowRank(mean, q), LowRank(own, q), {"P": following, "Q": q})
        mean, own = yield Mean(delta.transposed_times(p))
        following = yield from orthonormal(mean, context, "fill Q", in_blocks=False)
        return Result(LowRank(p, mean), LowRank(p, own), {"P": p, "Q": following})

    def _restarted(self, delta: Delta, context: Context) -> Steps:
        """Make a restart of PowerSGD+, and take both factors from it."""
        result = yield from (svd_comp if self.restart == "svd" else randomized_comp)(delta, context)
        applied = result.applied
        assert isinstance(applied, LowRank)
        q = yield from orthonormal(applied.q, context, "fill Q", in_blocks=False)
        return Result(applied, result.sent, {"P": applied.p, "Q": q})


def _projects_on_q(m: int, n: int, r: int, variant: int) -> bool:
    """Return whether the step uses Q: the first one after a restart does; where r =
    min(m, n), all or none do.
    """
    return n <= m if r == min(m, n) else variant == 0
