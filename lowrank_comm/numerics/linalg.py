"""Batched linear algebra of tall, thin matrices: orthonormal bases with a rule for dead
columns, truncated SVD.

Orthonormalisation has three paths, from cheap to sure; `compressors.subspaces` chooses.

    Cholesky-QR in float32   two passes are orthonormal to round-off while the pivot is
                             above 1e-2
    the same in float64      down to a pivot of 1e-7
    column by column         dead columns (zero, or dependent on those before) are found
                             and replaced by given random vectors

A pass of Cholesky-QR is two matrix products and a Cholesky factorisation of the r x r
Gram matrix, without a loop over columns. Its smallest pivot, the sine of the smallest
angle between a column and those before it, tells how good the basis is; it stays on the
device until the caller reads it. A basis with replaced columns is legitimate: P P^T
stays an orthogonal projection, only some of its directions are arbitrary. No function
here returns a zero column, since a zero column of Q would stay zero for ever.

Everything works on batches (B, m, r); a batch gives what its members would give alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from lowrank_comm.numerics.block_krylov import columns_of_space, leading_left_vectors
from lowrank_comm.numerics.device import counts_as_large, on_accelerator
from lowrank_comm.numerics.shapes_only import once_for_a_shape

# elements of the largest matrix that is decomposed, and of several that are together
_SVD_ELEMENTS = 1 << 20
# a float64 Gram matrix cannot resolve an angle below about sqrt(1e-16)
_PIVOT_FLOOR = 1e-7
# elements of which a norm is formed at once
_NORM_OF = 1 << 22


def or_one(x: Tensor) -> Tensor:
    """Return x with 1 in the place of what is not positive, as a divisor."""
    return torch.where(x > 0, x, torch.ones_like(x))


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Form products in their tensors' own dtypes inside: without autocast, and without
    TensorFloat-32 or bfloat16 in the place of float32, with which P would be
    orthonormal to 1e-3 only and sent + kept would differ from given by as much.
    """
    backends: tuple[Any, ...] = (
        torch.backends.cuda.matmul,
        getattr(torch.backends.mkldnn, "matmul", None),
    )
    with contextlib.ExitStack() as stack:
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        for backend in backends:
            # since torch 2.9; it does not go together with the older settings
            if hasattr(backend, "fp32_precision"):
                if backend.fp32_precision not in ("none", "ieee"):
                    stack.enter_context(_set(backend, "fp32_precision", "ieee"))
            elif getattr(backend, "allow_tf32", False):
                stack.enter_context(_set(backend, "allow_tf32", False))
        yield


@contextlib.contextmanager
def _set(backend: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(backend, name)
    setattr(backend, name, value)
    try:
        yield
    finally:
        setattr(backend, name, before)


def dead_tolerance(dtype: torch.dtype) -> float:
    """Return the relative norm at or below which a column counts as round-off: 64 eps
    of the dtype that it was computed in.
    """
    return 64.0 * torch.finfo(dtype).eps


def safe_pivot(dtype: torch.dtype) -> float:
    """Return the pivot above which Cholesky-QR is precise enough in this dtype."""
    return 1e-2 if dtype == torch.float32 else _PIVOT_FLOOR


def least_pivot(dtype: torch.dtype) -> float:
    """Return the pivot at or below which float64 finds a matrix that was computed in
    `dtype` rank-deficient.
    """
    return max(dead_tolerance(dtype), _PIVOT_FLOOR)


def inverse_factor(
    gram: Tensor, dtype: torch.dtype, pivot: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Factorise the Gram matrices of one pass of Cholesky-QR; a second pass on the
    basis of the first makes that orthonormal to round-off.

    G = a^T a = L L^T;  W = L^-T;  basis = a W;  pivot = min_i L_ii / sqrt(G_ii)

    How a's columns are scaled does not matter to the precision: Cholesky's rounding
    errors scale with them.

    Args:
        gram: G of all rows, (B, r, r) float64.
        dtype: of a, float32 or float64.
        pivot: of the first pass, in the second one.

    Returns:
        (W, pivot): W (B, r, r) in `dtype`, garbage where the pivot is not positive;
        pivot (B,) float64 on the device, computed without a synchronisation: the
        smallest sine of an angle between a column and those before it, in the first
        pass; 0 or NaN where a column is zero next to the largest, or a number is not
        finite or out of the dtype's range.
    """
    lower, info = torch.linalg.cholesky_ex(gram)
    identity = _identity(gram.shape[-1], gram.device).expand_as(gram)
    factor = torch.linalg.solve_triangular(lower.mT, identity, upper=True).to(dtype)
    if pivot is not None:
        # a basis with a good pivot is finite, and nearly orthonormal
        return factor, pivot * (info == 0)
    squares = gram.diagonal(dim1=-2, dim2=-1)
    smallest = (lower.diagonal(dim1=-2, dim2=-1) * squares.rsqrt()).amin(dim=-1)
    least, largest = torch.aminmax(squares, dim=-1)
    return factor, smallest * ((info == 0) & (least > dead_tolerance(dtype) ** 2 * largest))


_IDENTITIES: dict[tuple[int, torch.device], Tensor] = {}


def _identity(r: int, device: torch.device) -> Tensor:
    known = _IDENTITIES.get((r, device))
    if known is None:
        known = torch.eye(r, dtype=torch.float64, device=device)
        # not what a mode (of fake or local tensors) makes in its place
        if type(known) is Tensor:
            _IDENTITIES[r, device] = known
    return known


def orthonormal_rank_revealing(a: Tensor, fill: Tensor) -> Tensor:
    """Return an orthonormal basis whose range contains range(a); dead columns of a are
    replaced by columns of `fill`.

    Gram-Schmidt, each column orthogonalised twice, in float64. A column is dead when it
    is zero next to the largest one, or when less than 64 eps of it is left after the
    projection on those before.

    Args:
        a: (B, m, r), r <= m; the only path for zero and rank-deficient matrices.
        fill: (B, m, r) random vectors, the same on all workers.

    Returns:
        (B, m, r) in a's dtype.
    """
    tolerance = dead_tolerance(a.dtype)
    norms = torch.linalg.vector_norm(a, dim=-2, keepdim=True, dtype=torch.float64)
    scaled = a.double() / or_one(norms)
    alive = norms > tolerance * norms.amax(dim=-1, keepdim=True)
    basis = torch.zeros_like(scaled)
    for k in range(a.shape[-1]):
        before = basis[..., :k]
        column = _project_out(scaled[..., k : k + 1], before)
        left = torch.linalg.vector_norm(column, dim=-2, keepdim=True)
        usable = alive[..., k : k + 1] & (left > tolerance)
        replacement = _project_out(fill[..., k : k + 1].double(), before)
        column = torch.where(
            usable, column / torch.where(usable, left, torch.ones_like(left)), replacement
        )
        # dividing by a small rest amplified what round-off had left
        column = _project_out(column, before)
        basis[..., k : k + 1] = column / torch.linalg.vector_norm(column, dim=-2, keepdim=True)
    return basis.to(a.dtype)


def _project_out(column: Tensor, basis: Tensor) -> Tensor:
    """Subtract column's projection on the orthonormal basis, twice, since once leaves
    round-off behind.
    """
    for _ in range(2):
        column = column - basis @ (basis.mT @ column)
    return column


def thin_svd(d: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading r singular vectors and all singular values of d = U S V^T.

    Args:
        d: (B, m, n), finite.
        r: number of vectors, r <= min(m, n).

    Returns:
        (U[:, :r], S, V[:, :r]): (B, m, r), (B, min(m, n)) descending, (B, n, r). NaN if
        the decomposition does not converge, which vetoes the step on all workers, where
        an exception on this one alone would leave the others waiting. Of a d that is
        not finite at least S is NaN.
    """
    # a decomposition is as large as what is decomposed
    together = max(1, _SVD_ELEMENTS // max(1, d[0].numel()))
    parts = []
    try:
        for part in d.split(together):
            u, s, vh = torch.linalg.svd(part, full_matrices=False)
            parts.append((u[..., :r].contiguous(), s, vh.mT[..., :r].contiguous()))
    except torch.linalg.LinAlgError:
        shapes = ((*d.shape[:-1], r), (len(d), min(d.shape[-2:])), (len(d), d.shape[-1], r))
        u, s, v = (torch.full(shape, torch.nan, dtype=d.dtype, device=d.device) for shape in shapes)
        return u, s, v
    u, s, v = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    return u, s, v


@once_for_a_shape
def leading_left_singular_vectors(d: Tensor, r: int) -> Tensor:
    """Return U[:, :r] of d = U S V^T: exactly up to 2^20 elements, and where r is large
    next to min(m, n); of larger matrices an orthonormal basis that captures almost as
    much.

    ||U^T d||^2 is then at least 0.999 of the exact one where singular value r + 1 is at
    most 0.9 of value r, and at least 0.98 where the spectrum is flat or clustered; see
    `block_krylov`, which takes a second for 4096 x 14336, and not minutes.

    Args:
        d: (B, m, n), finite.
        r: number of vectors, r <= min(m, n).

    Returns:
        (B, m, r) orthonormal; NaN as of `thin_svd`, and where a d of more than 2^20
        elements is not finite.
    """
    sides = d.shape[-2:]
    if not counts_as_large(sides.numel(), _SVD_ELEMENTS) or min(sides) <= columns_of_space(r):
        return thin_svd(d, r)[0]
    # a CPU works through large matrices one by one
    parts = (d,) if on_accelerator(d.device) else d.split(1)
    try:
        return torch.cat([leading_left_vectors(part, r) for part in parts])
    except torch.linalg.LinAlgError:
        return torch.full((*d.shape[:-1], r), torch.nan, dtype=d.dtype, device=d.device)


def norm(tensor: Tensor) -> Tensor:
    """Return the norm of all numbers, formed in float64, of which torch makes a copy
    first: of large tensors part by part.
    """
    return _norm_in_parts(tensor, _NORM_OF)


@once_for_a_shape
def _norm_in_parts(tensor: Tensor, most: int) -> Tensor:
    """Return the norm, formed of at most so many elements at once."""
    if tensor.numel() <= most:
        return torch.linalg.vector_norm(tensor, dtype=torch.float64)
    parts = tensor.reshape(-1).split(most)
    return torch.linalg.vector_norm(torch.stack([_norm_in_parts(part, most) for part in parts]))


def largest_magnitude(x: Tensor) -> Tensor:
    """Return max |x|, 0-d; NaN if a number is NaN. x: not empty."""
    if on_accelerator(x.device):
        return torch.linalg.vector_norm(x, torch.inf)
    # torch's norm is fifty times slower on a CPU
    return torch.stack(torch.aminmax(x)).abs().amax()


def largest_magnitudes(x: Tensor) -> Tensor:
    """Return max |x| of each row: (k,); NaN if a number of it is NaN. x: (k, n)."""
    if on_accelerator(x.device):
        return torch.linalg.vector_norm(x, torch.inf, dim=1)
    return x.abs().amax(dim=1)


def columns_of(a: Tensor, which: Tensor) -> Tensor:
    """Return some columns of each matrix. a: (B, m, k), which: (B, j)."""
    return a.gather(2, which[:, None, :].expand(-1, a.shape[1], -1))


def unsound(named: Iterable[tuple[str, Tensor]], limit: float) -> str:
    """Return which tensors hold a number that is not finite, or above `limit` in size,
    and which number; "" for none. Three are named.
    """
    there = [(name, tensor) for name, tensor in named if tensor.numel()]
    if not there:
        return ""
    sizes = torch.stack(
        [largest_magnitude(tensor.detach()).to("cpu", torch.float64) for _, tensor in there]
    )
    bad = [
        f"{name} holds {size:.3g}"
        for (name, _), size in zip(there, sizes.tolist(), strict=True)
        if not size <= limit
    ]
    return ", ".join(bad[:3]) + (f" and {len(bad) - 3} more" if len(bad) > 3 else "")


def is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers are finite, without another tensor of this size."""
    return not tensor.numel() or bool(torch.isfinite(largest_magnitude(tensor.detach())))


def all_finite(gradients: Iterable[Tensor | None]) -> bool:
    """Return whether decoded gradients of a narrow dtype are finite; for float16, whose
    range a sum may leave.
    """
    flags = [torch.isfinite(gradient).all() for gradient in gradients if gradient is not None]
    return not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all())
