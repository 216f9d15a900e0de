"""Random projection: a fresh random subspace at every step, known to all workers from
the seed.

    P = orth(N(0, 1)^{s x r}) from (seed, name, t)        no bytes
    R = mean of Delta_i P                                 l r elements
    form="contractive":  applied = R P^T
                         E ||Delta - applied||^2 = (1 - r / s) ||Delta||^2
    form="unbiased":     applied = (s / r) R P^T
                         E applied = mean(Delta), omega = s / r - 1

With the basis on the side of the rows: R = mean of Delta_i^T P, applied = P R^T.

The contractive form needs error feedback, and what it leaves goes out later, since the
next subspace is independent of this one. The unbiased form must have none: its residual
is longer than Delta whenever r < s / 2, and the memory would grow without bound.
Divided by 1 + omega = s / r it is the contractive one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from lowrank_comm.compressors.base import Compressor, Context, Delta, State, Steps
from lowrank_comm.compressors.galore import Side, projected, projected_elements
from lowrank_comm.compressors.subspaces import basis_side, random_basis


@dataclass(frozen=True)
class RandomProjection(Compressor):
    """Projection of the mean gradient on a random subspace that is drawn at every step.

    applied = mean(Delta_i) P P^T, times s / r in the unbiased form,
    P = orth(Gaussian) from (seed, name, t)

    Args:
        rank: r; cut to min(m, n) matrix by matrix.
        form: "contractive" (with error feedback) or "unbiased" (times s / r, without).
        side: of the matrix that has the basis, "short" (r max(m, n) elements a step) or
            "long" (r min(m, n), and a random basis captures r / max(m, n) only).

    Raises:
        ConfigError: a value is out of range.

    Example:
        >>> from lowrank_comm import RandomProjection
        >>> RandomProjection(rank=4).elements(m=100, n=50, r=4)
        400

    Source: the random-projection row of Table 2 of arXiv 2509.11254; Remark 2 there for
    the constant r / s.
    """

    form: Literal["contractive", "unbiased"] = "contractive"
    side: Side = "short"

    json_name = "random_projection"
    row_blocks = True

    @property
    def contractive(self) -> bool:  # type: ignore[override]
        """True for the contractive form only."""
        return self.form == "contractive"

    def elements(self, m: int, n: int, r: int) -> int:
        return projected_elements(m, n, r, self.side)

    def step(self, delta: Delta, state: State, context: Context) -> Steps:
        on_rows, s = basis_side(delta, context, self.side)
        p = random_basis(context, "random P", s, context.rank, delta.like)
        result = yield from projected(delta, p, context, on_rows, self.unbiased)
        return replace(result, state={})
