"""The basis from which GreedyLore chooses, and the choice: the approximate global
top-r of its columns.

Source: GreedyLore (Chen, He, Li, Jia, Yuan; arXiv 2507.08784). U is an orthonormal
basis of a matrix's short side, (B, s, c), on the right for n <= m and on the left
otherwise. It comes from a mean D that all workers know, and is used for many steps.
Each step wants the r columns that capture most of the mean of Delta. No worker can tell
them from its own part: the column that is largest in one worker's Delta may cancel in
the mean. So (m >= n):

    Y_i        = Delta_i U                   l x c, local
    score_i[k] = <Y_i[:, k], Z[:, k]>        Z ~ N(0, 1)^{l x c} from (seed, name, t)
    score      = mean of score_i             c elements for each probe Z
    V          = U[:, J]                     J = the r largest sums of score^2

The sums are over the probes; of equal ones, the lower index is chosen. E score[k]^2 =
||mean(Delta) u_k||^2. The scores are averaged with their signs and squared afterwards;
the mean of squares would measure each worker's noise. The columns of Z are independent,
so the scores are, and a column that weighs more is never less likely to be chosen:
hence, by Chebyshev's sum inequality, the choice captures at least r / c of what U spans
in expectation, however U was found.

Capped bases. A whole basis, c = s, takes s^2 numbers of memory for each matrix (as many
as the matrix, if it is square), an s x s decomposition at each refresh, and l s normal
numbers for each probe and step. With c < s columns, from a randomized range finder on D
(Gaussian sketch with 8 more columns, one power iteration, then the leading c singular
directions within it), these are s c, a few products, and l c. What it costs: what Delta
has outside span(U) is not sent before the next refresh.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from lowrank_comm.compressors.base import (
    Context,
    Delta,
)
from lowrank_comm.compressors.requests import ComputeOnce, Mean, Request
from lowrank_comm.compressors.subspaces import basis_on_rows, orthonormal
from lowrank_comm.errors import ConfigError
from lowrank_comm.numerics.linalg import (
    columns_of,
    leading_left_singular_vectors,
    orthonormal_rank_revealing,
)
from lowrank_comm.options import Advice, PositiveInt

CAP = 32
"""Columns of a capped basis for each column that is chosen."""
OVERSAMPLED = 8

Columns = Annotated[
    PositiveInt | Literal["full"] | None,
    Advice(
        f"it is a number of columns, and left out it is {CAP} times the rank",
        when=lambda value: not isinstance(value, str),
    ),
]
"""Of a basis; see `basis_columns`."""


def check_basis(owner: str, basis: str | int | None, rank: int) -> None:
    """Raise a ConfigError if `basis` has fewer columns than are chosen from it."""
    if isinstance(basis, int) and basis < rank:
        raise ConfigError(
            f"{owner}: basis={basis} has fewer columns than rank={rank} are chosen from it; use at"
            f" least {rank}."
        )


def basis_columns(basis: str | int | None, s: int, r: int) -> int:
    """Return c, the columns of the basis of a short side of s dimensions at rank r."""
    if basis == "full":
        return s
    return min(s, CAP * r if basis is None else max(int(basis), r))


def initial_basis(context: Context, s: int, columns: int, like: Tensor) -> Tensor:
    """Return random coordinate vectors, (B, s, columns): a basis for a parameter that
    is added between two refreshes.
    """
    chosen = context.draw("initial U", (s,), like).argsort(dim=-1)[:, :columns]
    basis = torch.zeros(len(context.names), s, columns, dtype=like.dtype, device=like.device)
    return basis.scatter_(1, chosen[:, None, :], 1.0)


def find_basis(d: Tensor, context: Context, columns: int) -> Generator[Request, Any, Tensor]:
    """Find the leading singular directions of the mean D on its short side, on one
    worker: (B, s, columns), in descending order; exact where `columns` and 8 more are
    all there are.

    Unlike `subspaces.singular_vectors` it may be approximate, and takes Cholesky-QR
    after the wire's rounding, since there may be thousands of columns.
    """
    matrices = d if basis_on_rows(*d.shape[-2:]) else d.mT
    s = matrices.shape[-2]

    def compute(some: Tensor, indices: list[int]) -> Tensor:
        if columns + OVERSAMPLED >= s:
            return leading_left_singular_vectors(some, columns)
        return _range_finder(some, columns, context.only(indices))

    u: Tensor = yield ComputeOnce(matrices, s, columns, compute)
    # a basis that was rounded on the wire is orthonormal no more
    if context.wire_rounds:
        u = yield from orthonormal(u, context, "fill U", in_blocks=False)
    return u


def _range_finder(a: Tensor, columns: int, context: Context) -> Tensor:
    """Approximate the leading `columns` left singular vectors of a, (b, s, l)."""
    s, sketched = a.shape[-2], columns + OVERSAMPLED
    sketch, _ = torch.linalg.qr(a @ context.draw("sketch U", (a.shape[-1], sketched), a))
    long_side, _ = torch.linalg.qr(a.mT @ sketch)
    basis = orthonormal_rank_revealing(
        a @ long_side, context.draw("fill the sketch of U", (s, sketched), a)
    )
    return basis @ leading_left_singular_vectors(basis.mT @ a, columns)


def score_elements(columns: int, r: int, probes: int) -> int:
    """Count the elements of one matrix's scores; 0 where there is nothing to choose."""
    return probes * columns if columns > r else 0


def greedy_choice(
    delta: Delta, u: Tensor, context: Context, probes: int
) -> Generator[Request, Any, Tensor]:
    """Choose the r columns of U with the largest scores; the host waits for nothing.

    Args:
        delta: (B, m, n), whole matrices.
        u: (B, s, c) orthonormal.
        context: of the batch.
        probes: Gaussian probes for each column.

    Returns:
        (B, s, r), in the order of their scores.
    """
    r, columns = context.rank, u.shape[-1]
    if columns == r:
        return u
    y = delta.transposed_times(u) if basis_on_rows(*delta.shape[-2:]) else delta.times(u)
    own = [
        (y * context.draw(f"probe {k}", tuple(y.shape[1:]), y)).sum(dim=-2) for k in range(probes)
    ]
    scores, _ = yield Mean(torch.stack(own, dim=1), "scores")
    # a square may leave float32's range
    energy = scores.double().square().sum(dim=1)
    best = torch.sort(energy, dim=-1, descending=True, stable=True).indices[:, :r]
    return columns_of(u, best)
