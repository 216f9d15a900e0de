"""GaLore as a communication scheme: gradients are sent in coordinates of a subspace
that is refreshed every tau steps.

Source: GaLore (Zhao et al.; arXiv 2403.03507), as a scheme of data-parallel
communication in Table 2 of PowerSGD+ (arXiv 2509.11254). P is s x r, orthonormal, on
one side of the matrix; here on that of the columns (s = n, l = m):

    t mod tau == 0:
        D = mean of Delta_i              the whole matrix is sent: m n elements
        P = V[:, :r] of D = U S V^T      computed on one worker and broadcast: s r
        R = D P
    else:
        R = mean of Delta_i P            l r elements
    applied = R P^T = mean(Delta_i) P P^T
    sent_i  = Delta_i P P^T

With P on the side of the rows (s = m, l = n): R = mean of Delta_i^T P, applied = P R^T.

The side. Public code puts the basis on the short side: P is small, and a random
subspace of it captures r / min(m, n). Table 2's "n r" with m >= n is a basis on the
long side: fewer bytes in an ordinary step, the same capture by singular vectors at the
refresh, but only r / max(m, n) by a random basis. A square matrix has its basis on the
columns.

P comes from the mean's SVD, on one worker, and is broadcast: the SVD of each worker's
own gradient would give each another P, and R would be a mean of coordinates in
different systems. The paper has no error feedback, and the default here is none: what
is orthogonal to P is lost until the next refresh, and where noise dominates the
gradient, for ever. That is GaLore's trap, which GoLore escapes (arXiv 2410.11289).

It is not GaLore's optimizer, whose moments are l x r, projected too: the base optimizer
here gets R P^T and keeps a state of full size. `ProjectedAdamW` is that optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from lowrank_comm.compressors.base import (
    Compressor,
    Context,
    Delta,
    Form,
    LowRank,
    Result,
    State,
    Steps,
)
from lowrank_comm.compressors.requests import Mean
from lowrank_comm.compressors.subspaces import (
    basis_rows,
    basis_side,
    project,
    projected_here,
    random_basis,
    singular_vectors,
)
from lowrank_comm.options import PositiveInt

Side = Literal["short", "long"]


@dataclass(frozen=True)
class GaLore(Compressor):
    """Gradients in coordinates of the leading singular vectors of the mean gradient,
    refreshed every tau steps.

    applied = mean(Delta_i) P P^T (or P P^T mean(Delta_i)),
    P = top-r singular vectors of mean(Delta_i) at the last refresh

    Args:
        rank: r; cut to min(m, n) matrix by matrix.
        restart_every: tau in steps; the first step (t = 0) is a refresh.
        side: of the matrix that has the basis, "short" (r max(m, n) elements a step) or
            "long" (r min(m, n), and a random basis captures r / max(m, n) only).
        apply_full: apply the whole mean at a refresh by SVD, where it is on the wire
            anyway; false is the papers' scheme.

    Raises:
        ConfigError: a value is out of range.

    Example:
        >>> from lowrank_comm import GaLore
        >>> galore = GaLore(rank=4, restart_every=200)
        >>> galore.elements(m=100, n=50, r=4), galore.restart_elements(m=100, n=50, r=4)
        (400, 5200)

    Source: arXiv 2403.03507; Table 2 of arXiv 2509.11254.
    """

    restart_every: PositiveInt = 200
    side: Side = "short"
    apply_full: bool = False

    json_name = "galore"
    feedback: ClassVar[Form] = "none"  # type: ignore[misc]

    def elements(self, m: int, n: int, r: int) -> int:
        return projected_elements(m, n, r, self.side)

    def restart_elements(self, m: int, n: int, r: int) -> int:
        return m * n + r * basis_rows(m, n, self.side)

    def initial_state(self, context: Context, m: int, n: int, like: Tensor) -> State:
        # Random, and not zero: a parameter that is added between two refreshes has no
        # other until the next.
        s = basis_rows(m, n, self.side)
        return {"P": random_basis(context, "initial P", s, context.rank, like)}

    def step(self, delta: Delta, state: State, context: Context) -> Steps:
        on_rows, _ = basis_side(delta, context, self.side)
        if context.restart:
            return refreshed(delta, context, on_rows, self.apply_full)
        return projected(delta, state["P"], context, on_rows)


def projected_elements(m: int, n: int, r: int, side: str) -> int:
    """Count the elements of R, l r: l is the length of the side without the basis."""
    return r * (m + n - basis_rows(m, n, side))


def projected(
    delta: Delta, p: Tensor, context: Context, on_rows: bool, scaled: bool = False
) -> Steps:
    """Make an ordinary step, one average: R = mean of Delta_i P (or Delta_i^T P),
    applied = R P^T (or P R^T), times s / r where `scaled`.

    Args:
        delta: (B, m, n), or the rows of it that this rank holds.
        p: (B, s, r) orthonormal, all of it on every rank.
        context: of the batch.
        on_rows: the basis is on the side of the rows.
        scaled: what is applied is unbiased for a random P, and no projection.
    """
    applied, sent = yield from project(delta, p, on_rows, context.rows)
    if scaled:
        s, r = p.shape[1:]
        applied, sent = (LowRank(part.p * (s / r), part.q) for part in (applied, sent))
    return Result(applied, sent, {"P": p})


def refreshed(delta: Delta, context: Context, on_rows: bool, apply_full: bool) -> Steps:
    """Make a refresh: the mean of whole matrices, and P of its leading singular
    vectors.
    """
    d, own = yield Mean(delta.tensor, "restart")
    p = yield from singular_vectors(d if on_rows else d.mT, context)
    if apply_full:
        return Result(applied=d, sent=own, state={"P": p})
    applied, sent = (projected_here(matrices, p, on_rows) for matrices in (d, own))
    return Result(applied, sent, {"P": p})
