"""PowerSGD+: PowerSGD whose subspace is computed from scratch every tau steps, so that
it cannot stay trapped.

Source: Algorithm 2 of PowerSGD+ (Xie, Chen, Yuan; arXiv 2509.11254). Where t mod tau ==
0, t from 0, SVD-Comp of its Algorithm 1 takes the place of SSP-Comp:

    D  = mean of Delta_i             the whole matrix is sent: m n elements
    P~ = U[:, :r] of D = U S V^T     computed on one worker and broadcast: m r
    Q  = D^T P~                      no elements
    applied = P~ Q^T,  sent_i = P~ (Delta_i^T P~)^T

The paper averages Q_i = Delta_i^T P~; the mean is the same number, and D is known
already, so nothing more is sent. P~ is broadcast since equal input does not give equal
singular vectors bit by bit (another number of threads is enough). Of a matrix of
more than 2^20 elements P~ captures almost as much (`numerics.block_krylov`).

`restart="randomized"` needs no whole matrix: SSP-Comp from a fresh Gaussian Q captures
at least r/n of the energy in expectation, the constant delta of Lemma 2, so Theorem 2
holds for it (Remark 2); one more power iteration, which never captures less, brings it
near to the SVD. 2 r (m + n) elements.

`restart="auto"`: the SVD for a matrix of at most 2^20 elements, else "randomized". The
SVD of large matrices takes seconds and most of a run's bytes: for the bf16 gradients of
Llama-3-8B at r = 4 and tau = 200, with factors in float32, the average ratio is 77 with
"svd" and 338 with "auto". With an option of the SVD restart it is the SVD for all.

`restart="random_projection"`: with s = min(m, n), V = orth(N(0, 1)^{s x r}) on the
short side, from (seed, name, t), delta = r/s, r max(m, n) elements:

    m >= n:   F = mean of Delta_i V       applied = F V^T     next Q = V
    m <  n:   F = mean of Delta_i^T V     applied = V F^T     next Q = orth(F)

`restart="greedy"`, the approximate top-r of Table 2's last row: a basis U of the short
side (`greedy_basis`) is found at every k-th restart, where D is sent and its leading r
directions are applied, as by the SVD; the restarts between choose the r columns of U
with the largest scores, V, and run SSP-Comp from Q = V (for m < n: on Delta^T). That
captures at least ||mean(Delta) V||^2, so delta >= r/s with a whole basis; a capped one
guarantees no more than Lemma 1 at these restarts, and tau in Theorem 2 is then the
period of the basis. r (m + n) + c elements, and m n + s c with the basis.

Two options of the SVD restart, both free of further bytes because D is sent anyway:
`exact_restart` applies all of D and clears the error memory, instead of keeping the
residual. With `consensus_restart` every worker keeps the mean residual D - P~ Q^T: the
trajectory stays the same (only the mean error matters), while the workers' errors,
which drift apart when their data differ, meet again.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal, get_args

from torch import Tensor

from lowrank_comm.compressors.base import (
    Context,
    Delta,
    LowRank,
    Result,
    State,
    Steps,
    transposed_product,
)
from lowrank_comm.compressors.greedy_basis import (
    Columns,
    basis_columns,
    check_basis,
    find_basis,
    greedy_choice,
    initial_basis,
    score_elements,
)
from lowrank_comm.compressors.powersgd import PowerSGD, next_q, ssp_comp
from lowrank_comm.compressors.requests import Mean, SumOverRows
from lowrank_comm.compressors.restart_schedule import RestartHistory
from lowrank_comm.compressors.subspaces import (
    basis_on_rows,
    basis_side,
    project,
    projected_here,
    random_basis,
    singular_vectors,
)
from lowrank_comm.errors import ConfigError
from lowrank_comm.options import Advice, PositiveInt

Restart = Literal["auto", "svd", "randomized", "greedy", "random_projection"]
RESTARTS: tuple[str, ...] = get_args(Restart)
SVD_ELEMENTS = 1 << 20
"""Elements of the largest matrix that restart="auto" restarts by the SVD."""
_NEVER = Advice(
    'for no restarts use the compressor "powersgd" (PowerSGD)', when=lambda value: not value
)
PROBES, BASIS_EVERY = 4, 10
"""Defaults of restart="greedy"."""


@dataclass(frozen=True)
class PowerSGDPlus(PowerSGD):
    """PowerSGD with a restart of the subspace every tau steps.

    t mod tau != 0:  SSP-Comp, as PowerSGD
    t mod tau == 0:  P~ from the mean of Delta itself

    Args:
        rank: r; cut to min(m, n) matrix by matrix.
        restart_every: tau: a restart where t mod tau == 0, from t = 0; where no worker
            has a gradient then, in the next step with one.
        restart: "svd" (the paper's rule, m n + m r elements), "randomized" (2 r (m + n)
            elements), "auto" (the SVD for matrices of at most 2^20 elements, else
            "randomized"; the SVD for all with exact_restart or consensus_restart),
            "greedy" (r (m + n) + c, and a new basis now and then) or
            "random_projection" (r max(m, n)).
        exact_restart: apply the whole mean at an SVD restart and clear the error
            memory.
        consensus_restart: set every worker's error to the mean residual at an SVD
            restart; good with a 16-bit error memory.
        stagger: spread the restarts of the matrices over the period, so that no step is
            slow (all restart at t = 0).
        basis_every: greedy only: restarts from one basis to the next; null for 10.
        basis: greedy only: its columns, a number or "full"; null for min(s, 32 r), s =
            min(m, n).
        probes: greedy only: Gaussian probes a column; null for 4, since a choice lasts
            for a period and is paid once.

    `power_iterations` is as in `PowerSGD`, and also of the SSP-Comp within a restart,
    which the extra iteration of "randomized" precedes.

    Raises:
        ConfigError: a value is out of range, or options contradict one another.

    Example:
        >>> from lowrank_comm import PowerSGDPlus
        >>> PowerSGDPlus(rank=4, restart_every=200).restart_elements(m=100, n=50, r=4)
        5400

    Source: Algorithms 1 and 2, Theorem 2 and Remark 2 of arXiv 2509.11254.
    """

    restart_every: Annotated[PositiveInt, _NEVER] = 200
    restart: Restart = "auto"
    exact_restart: bool = False
    consensus_restart: bool = False
    stagger: bool = False
    basis_every: PositiveInt | None = None
    basis: Columns = None
    probes: PositiveInt | None = None

    json_name = "powersgd_plus"

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("exact_restart", "consensus_restart"):
            if getattr(self, key) and self.restart not in ("auto", "svd"):
                raise ConfigError(
                    f"PowerSGDPlus: {key}=True needs the mean of Delta on the wire, which"
                    f' restart="{self.restart}" does not send; use restart="svd", or leave {key}'
                    " out."
                )
        if self.exact_restart and self.consensus_restart:
            raise ConfigError(
                "PowerSGDPlus: exact_restart=True clears the error memory on every worker, so"
                " consensus_restart=True has nothing to do; leave one of the two out."
            )
        for key in ("basis_every", "basis", "probes"):
            value = getattr(self, key)
            if value is not None and self.restart != "greedy":
                raise ConfigError(
                    f'PowerSGDPlus: {key}={value!r} has no meaning with restart="{self.restart}";'
                    f' use restart="greedy", or leave {key} out.'
                )
        check_basis("PowerSGDPlus", self.basis, self.rank)

    @property
    def row_blocks(self) -> bool:  # type: ignore[override]
        """False with restart="greedy", whose basis may lie along the rows."""
        return self.restart != "greedy"

    @property
    def projects(self) -> bool:  # type: ignore[override]
        """False where a restart's orthonormal factor is Q."""
        return self.restart in ("auto", "svd", "randomized")

    def restart_rule(self, m: int, n: int) -> tuple[str, str]:
        if self.restart != "auto":
            return self.restart, ""
        for key in ("exact_restart", "consensus_restart"):
            if getattr(self, key):
                return "svd", f"({key})"
        # the size of a matrix alone, and no device, so that all engines train alike
        if m * n <= SVD_ELEMENTS:
            return "svd", "of at most 2^20 elements"
        return "randomized", "of more than 2^20 elements"

    def restart_elements(self, m: int, n: int, r: int) -> int:
        rule, _ = self.restart_rule(m, n)
        if rule == "svd":
            return m * n + m * r
        if rule == "random_projection":
            return r * max(m, n)
        if rule == "greedy":
            every = self.basis_every or BASIS_EVERY
            return -(-(self._found(m, n, r) + (every - 1) * self._chosen(m, n, r)) // every)
        return r * (m + n) + self.elements(m, n, r)

    def variant(self, history: RestartHistory, restart: bool) -> int:
        """Return 1 for a greedy restart that chooses from the basis, else 0: every k-th
        restart of the matrix finds a new basis.
        """
        return int(
            restart
            and self.restart == "greedy"
            and history.restarts % (self.basis_every or BASIS_EVERY) > 0
        )

    def elements_in(self, m: int, n: int, r: int, variant: int, restart: bool) -> int:
        if not restart or self.restart != "greedy":
            return super().elements_in(m, n, r, variant, restart)
        return self._chosen(m, n, r) if variant else self._found(m, n, r)

    def initial_state(self, context: Context, m: int, n: int, like: Tensor) -> State:
        state = super().initial_state(context, m, n, like)
        if self.restart == "greedy":
            state["U"] = initial_basis(context, min(m, n), self._columns(m, n, context.rank), like)
        return state

    def step(self, delta: Delta, state: State, context: Context) -> Steps:
        if self.restart == "greedy":
            return self._with_basis(delta, state, context)
        if not context.restart:
            return ssp_comp(delta, state["Q"], context, iterations=self.power_iterations)
        # delta may be a block of the rows
        rule, _ = self.restart_rule(context.m or delta.shape[-2], delta.shape[-1])
        if rule == "svd":
            return svd_comp(delta, context, self.exact_restart, self.consensus_restart)
        if rule == "randomized":
            return randomized_comp(delta, context, self.power_iterations)
        return _random_projection_comp(delta, context)

    def _columns(self, m: int, n: int, r: int) -> int:
        return basis_columns(self.basis, min(m, n), r)

    def _found(self, m: int, n: int, r: int) -> int:
        """Count the elements of a greedy restart that finds a basis."""
        return m * n + min(m, n) * self._columns(m, n, r)

    def _chosen(self, m: int, n: int, r: int) -> int:
        """Count the elements of a greedy restart that chooses from the basis."""
        return self.elements(m, n, r) + score_elements(
            self._columns(m, n, r), r, self.probes or PROBES
        )

    def _with_basis(self, delta: Delta, state: State, context: Context) -> Steps:
        """Make a step of restart="greedy"."""
        u = state["U"]
        on_rows = basis_on_rows(*delta.shape[-2:])
        if not context.restart:
            result = yield from super().step(delta, state, context)
        elif context.variant == 0:
            d, own = yield Mean(delta.tensor, "restart")
            u = yield from find_basis(d, context, u.shape[-1])
            v = u[..., : context.rank]
            applied, sent = (projected_here(matrices, v, on_rows) for matrices in (d, own))
            result = Result(applied, sent, {"Q": (yield from next_q(applied.q, context))})
        else:
            v = yield from greedy_choice(delta, u, context, self.probes or PROBES)
            turned = _Transposed(delta) if on_rows else delta
            result = yield from ssp_comp(turned, v, context, "restart", self.power_iterations)
            if on_rows:
                result = _transposed(result)
        return replace(result, state=result.state | {"U": u})


def svd_comp(delta: Delta, context: Context, exact: bool = False, consensus: bool = False) -> Steps:
    """Run SVD-Comp of Algorithm 1, with P~ from one worker and Q from the mean that all
    have: m n + m r elements a matrix.

    Args:
        delta: (B, m, n), or the rows of it that this rank holds.
        context: of the batch.
        exact, consensus: see the options of `PowerSGDPlus`.
    """
    d, own = yield Mean(delta.tensor, "restart")
    p = yield from singular_vectors(d, context, in_blocks=True)
    q = yield SumOverRows(transposed_product(d, p))
    q_next = yield from next_q(q, context)
    applied = LowRank(p, q)
    if exact:
        return Result(applied=d, sent=own, state={"Q": q_next})
    sent = LowRank(p, (yield SumOverRows(transposed_product(own, p))))
    # What the wire's rounding took from this worker stays in its error.
    kept = (delta.tensor - own) + (d - applied.dense()) if consensus else None
    return Result(applied, sent, {"Q": q_next}, kept)


def randomized_comp(delta: Delta, context: Context, iterations: int = 1) -> Steps:
    """Run SSP-Comp from a fresh Gaussian Q, with one extra power iteration before it:
    (1 + iterations) r (m + n) elements a matrix.
    """
    fresh = context.draw("restart Q", (delta.tensor.shape[-1], context.rank), delta.tensor)
    return ssp_comp(delta, fresh, context, "restart", 1 + iterations)


def _random_projection_comp(delta: Delta, context: Context) -> Steps:
    """Project on a random subspace of the short side, which is the next step's. r
    max(m, n) elements a matrix.
    """
    on_rows, s = basis_side(delta, context)
    v = random_basis(context, "restart V", s, context.rank, delta.tensor)
    applied, sent = yield from project(delta, v, on_rows, context.rows, "restart")
    q = (yield from next_q(applied.q, context)) if on_rows else v
    return Result(applied, sent, {"Q": q})


class _Transposed(Delta):
    """Delta^T, whose products are those of Delta."""

    def __init__(self, delta: Delta) -> None:
        super().__init__(delta.tensor.mT)
        self._delta = delta

    def times(self, q: Tensor) -> Tensor:
        return self._delta.transposed_times(q)

    def transposed_times(self, p: Tensor) -> Tensor:
        return self._delta.times(p)


def _transposed(result: Result) -> Result:
    """Return SSP-Comp's result for Delta from its result for Delta^T, whose orthonormal
    P~ is the next basis Q.
    """
    applied, sent = result.applied, result.sent
    assert isinstance(applied, LowRank)
    assert isinstance(sent, LowRank)
    return Result(LowRank(applied.q, applied.p), LowRank(sent.q, sent.p), {"Q": applied.p})
