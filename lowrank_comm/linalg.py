"""Batched linear algebra of tall, thin matrices: orthonormal bases with a rule for dead columns, truncated SVD.

Orthonormalisation is Cholesky-QR, twice, with the r x r Gram matrix and the triangular solve in float64: two passes of
m r^2 work, no loop over columns, an orthogonality defect near round-off up to condition numbers of about 1e7. Whether
that path was good enough is told by a flag on the device; who reads the flag decides when to pay for the transfer.
When the flag says no, `orthonormal_rank_revealing` goes column by column, finds the dead ones (zero, or dependent on
those before) and puts given random vectors in their place. A basis with such replacements is legitimate: P P^T stays an
orthogonal projection, only some of its directions are arbitrary. Nothing here divides by a zero norm, and nothing
returns a zero column, since a zero column of Q would stay zero for ever.

Everything works on batches (B, m, r); a batch gives what its members would give alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

_DEPENDENCE_FLOOR = 1e-7  # a float64 Gram matrix cannot resolve an angle below about sqrt(1e-16)


def dead_tolerance(dtype: torch.dtype) -> float:
    """Relative norm at or below which a column counts as round-off: 64 eps of the dtype that it was computed in."""
    return 64.0 * torch.finfo(dtype).eps


def _norms(a: Tensor) -> Tensor:
    """Column norms (B, 1, r) in float64: squares of float32 numbers neither overflow nor vanish there."""
    return torch.linalg.vector_norm(a, dim=-2, keepdim=True, dtype=torch.float64)


def _column_health(a: Tensor) -> tuple[Tensor, Tensor]:
    """float64 columns scaled to norm 1, and for each matrix whether no column is zero or non-finite next to the others."""
    norm = _norms(a)
    largest = norm.amax(dim=-1, keepdim=True)
    alive = (norm > dead_tolerance(a.dtype) * largest) & torch.isfinite(norm)
    scaled = a.double() / torch.where(norm > 0, norm, torch.ones_like(norm))
    return scaled, alive.all(dim=-1).squeeze(-1)


def cholesky_qr(a: Tensor, passes: int = 2) -> tuple[Tensor, Tensor]:
    """Orthonormal basis of range(a) by Cholesky-QR in float64.

    Args:
        a: (B, m, r), r <= m.
        passes: 2 for a basis that is orthonormal to round-off; 1 where only its condition matters (then about
            1e-16 times the square of a's condition number, after scaling its columns).

    Returns:
        (basis, good): basis (B, m, r) in a's dtype with basis^T basis = I where good, garbage elsewhere; good: (B,)
        bool on the device, computed without a synchronisation: no column is zero, or dependent on the others.
    """
    basis, good = _column_health(a)
    for k in range(passes):
        lower, info = torch.linalg.cholesky_ex(basis.mT @ basis)
        basis = torch.linalg.solve_triangular(lower.mT, basis, upper=True, left=False)
        good = good & (info == 0)
        if k == 0:  # pivots are the sines of the angles between a column and those before it
            pivot = lower.diagonal(dim1=-2, dim2=-1).amin(dim=-1)
            good = good & (pivot > max(dead_tolerance(a.dtype), _DEPENDENCE_FLOOR))
    return basis.to(a.dtype), good


def orthonormal_rank_revealing(a: Tensor, fill: Tensor) -> Tensor:
    """Orthonormal (B, m, r) whose range contains range(a); dead columns of a are replaced by columns of `fill`.

    Gram-Schmidt, each column orthogonalised twice, in float64. A column is dead when it is zero next to the largest
    one, or when less than 64 eps of it is left after the projection on those before.

    Args:
        a: (B, m, r), r <= m; the only path for zero and rank-deficient matrices.
        fill: (B, m, r) random vectors, the same on all workers.

    Returns:
        (B, m, r) in a's dtype.
    """
    tolerance = dead_tolerance(a.dtype)
    scaled, _ = _column_health(a)
    norms = _norms(a)
    alive = norms > tolerance * norms.amax(dim=-1, keepdim=True)
    basis = torch.zeros_like(scaled)
    for k in range(a.shape[-1]):
        before = basis[..., :k]
        column = _project_out(scaled[..., k : k + 1], before)
        left = torch.linalg.vector_norm(column, dim=-2, keepdim=True)
        usable = alive[..., k : k + 1] & (left > tolerance)
        replacement = _project_out(fill[..., k : k + 1].double(), before)
        column = torch.where(usable, column / torch.where(usable, left, torch.ones_like(left)), replacement)
        column = _project_out(column, before)  # dividing by a small rest amplified what round-off had left
        basis[..., k : k + 1] = column / torch.linalg.vector_norm(column, dim=-2, keepdim=True)
    return basis.to(a.dtype)


def _project_out(column: Tensor, basis: Tensor) -> Tensor:
    """column minus its projection on the orthonormal basis, twice, since once leaves round-off behind."""
    for _ in range(2):
        column = column - basis @ (basis.mT @ column)
    return column


def leading_left_singular_vectors(d: Tensor, r: int) -> Tensor:
    """U[:, :r] of the singular value decomposition d = U S V^T.

    Args:
        d: (B, m, n), finite.
        r: number of vectors, r <= min(m, n).

    Returns:
        (B, m, r) orthonormal.
    """
    return torch.linalg.svd(d, full_matrices=False).U[..., :r].contiguous()
