"""Bases on one side of a matrix: on which side, drawn without a gradient, from singular
vectors, orthonormalised; and what a projection on one sends.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from lowrank_comm.compressors.base import Context, Delta, LowRank, transposed_product
from lowrank_comm.compressors.requests import (
    ComputeOnce,
    Decide,
    InverseFactor,
    Mean,
    Request,
    SumOverRows,
    WholeRows,
)
from lowrank_comm.numerics.device import on_device
from lowrank_comm.numerics.linalg import (
    leading_left_singular_vectors,
    least_pivot,
    orthonormal_rank_revealing,
    safe_pivot,
)


def basis_on_rows(m: int, n: int, side: str = "short") -> bool:
    """Return whether an m x n matrix has its basis on the side of its rows (P is m x
    r), and not of its columns (n x r); a square one has it on the columns.
    """
    return m < n if side == "short" else m > n


def basis_rows(m: int, n: int, side: str = "short") -> int:
    """Return s, the rows of the basis of an m x n matrix."""
    return m if basis_on_rows(m, n, side) else n


def basis_side(delta: Delta, context: Context, side: str = "short") -> tuple[bool, int]:
    """Return (whether the basis of these matrices is on the side of their rows, s)."""
    # delta may be a block of the rows
    m, n = context.m or delta.shape[-2], delta.shape[-1]
    return basis_on_rows(m, n, side), basis_rows(m, n, side)


def random_basis(context: Context, purpose: str, rows: int, r: int, like: Tensor) -> Tensor:
    """Return orth of a Gaussian matrix from (seed, name, t, purpose): its range is
    uniformly distributed, E P P^T = (r / rows) I.

    Args:
        context: of the batch, whose names and t are part of the key.
        purpose: what the basis is for; part of the key.
        rows: of the basis.
        r: its columns, r <= rows.
        like: of whose dtype and device the result is.

    Returns:
        (B, rows, r) orthonormal, equal on all workers. Orthonormalised on the CPU in
        float64 where it is drawn, so that the result does not depend on the device; by
        Householder QR, which needs no rule for dead columns.
    """
    drawn = context.draw(purpose, (rows, r), torch.empty(0, dtype=torch.float64, device="cpu"))
    return on_device(torch.linalg.qr(drawn).Q, like.device).to(like.dtype)


def singular_vectors(
    d: Tensor, context: Context, in_blocks: bool = False
) -> Generator[Request, Any, Tensor]:
    """Leading left singular vectors of the mean d, computed on one worker and sent to
    all, since equal input does not determine them bit by bit.

    Args:
        d: (B, s, l), or the rows of it that this rank holds.
        context: of the batch; `rank` vectors are computed.
        in_blocks: `d` may be a block of the rows, as `context` says; else it is whole.

    Returns:
        (B, s, r) orthonormal, or this rank's rows of it.
    """
    r, s = context.rank, context.m if in_blocks else d.shape[-2]
    p: Tensor = yield ComputeOnce(
        d, s, r, lambda matrices, _: leading_left_singular_vectors(matrices, r)
    )
    if not context.wire_rounds:
        return p
    # a basis that was rounded on the wire is orthonormal no more
    whole = (yield WholeRows(p, s)) if in_blocks else p
    basis = orthonormal_rank_revealing(whole, context.draw("fill P", (s, r), p))
    return basis[:, context.rows] if in_blocks else basis


def orthonormal(
    a: Tensor, context: Context, purpose: str, passes: int = 2, in_blocks: bool = True
) -> Generator[Request, Any, Tensor]:
    """Return orth(a) for an averaged a: by Cholesky-QR, again in float64 where columns
    are nearly dependent, and column by column where they are dependent. Each matrix
    gets what it would get alone.

    Args:
        a: (B, rows, r), equal on all workers.
        context: of the batch.
        purpose: of the random vectors that replace dead columns; part of their key.
        passes: 2 for a basis that is orthonormal to round-off, 1 where only its
            condition matters.
        in_blocks: `a` is a block of the rows where the matrices are held so, as P is.
            The r x r Gram matrices are then summed over the blocks, and in the last
            case all rows of `a` are fetched.

    Returns:
        (B, rows, r) in a's dtype.
    """
    in_blocks = in_blocks and context.in_blocks
    basis, pivot = yield from _cholesky_qr(a, passes, in_blocks)
    limit = safe_pivot(a.dtype)
    if (yield Decide(pivot, limit)):
        return basis
    unsafe = (~(pivot > limit)).nonzero().flatten()
    wide, pivot = yield from _cholesky_qr(a[unsafe].double(), 2, in_blocks)
    basis[unsafe] = wide.to(a.dtype)
    limit = least_pivot(a.dtype)
    if (yield Decide(pivot, limit)):
        return basis
    dead = unsafe[~(pivot > limit)]
    whole = (yield WholeRows(a[dead], context.m)) if in_blocks else a[dead]
    fill = context.only(dead.tolist()).draw(purpose, tuple(whole.shape[-2:]), a)
    filled = orthonormal_rank_revealing(whole, fill)
    basis[dead] = filled[:, context.rows] if in_blocks else filled
    return basis


def _cholesky_qr(
    a: Tensor, passes: int, in_blocks: bool
) -> Generator[Request, Any, tuple[Tensor, Tensor]]:
    """Run passes of Cholesky-QR with the Gram matrices of all rows; return (basis,
    pivot).
    """
    basis, pivot = a, None
    for _ in range(passes):
        gram = basis.mT @ basis
        if in_blocks:
            gram = yield SumOverRows(gram.double())
        factor, pivot = yield InverseFactor(gram, a.dtype, pivot)
        basis = basis @ factor
    assert pivot is not None
    return basis, pivot


def project(
    delta: Delta, v: Tensor, on_rows: bool, rows: slice = slice(None), kind: str = "factors"
) -> Generator[Request, Any, tuple[LowRank, LowRank]]:
    """Project the mean of Delta on V's range, in one average.

    Args:
        delta: (B, m, n), or the rows of it that this rank holds.
        v: (B, s, r), all of it on every rank.
        on_rows: V is on the side of the rows, s = m; else s = n.
        rows: those that this rank holds.
        kind: of the ledger.

    Returns:
        (applied, sent): F V^T with F = mean of Delta_i V, and the same of this worker's
        own; with V on the side of the rows V F^T, F = mean of Delta_i^T V.
    """
    if on_rows:
        part = v[:, rows]
        mean, own = yield Mean(delta.transposed_times(part), kind, over_rows=True)
        return LowRank(part, mean), LowRank(part, own)
    mean, own = yield Mean(delta.times(v), kind)
    return LowRank(mean, v), LowRank(own, v)


def projected_here(d: Tensor, v: Tensor, on_rows: bool) -> LowRank:
    """Project matrices that are known here on V's range, without a collective.

    Args:
        d: (B, m, n).
        v: (B, s, r), on the side of the rows (s = m) or of the columns (s = n).
        on_rows: which of the two.
    """
    return LowRank(v, transposed_product(d, v)) if on_rows else LowRank(d @ v, v)
