"""Leading singular vectors of large matrices by a block Krylov method: a few thin
products in the place of a decomposition.

Source: Musco & Musco, "Randomized Block Krylov Methods for Stronger and Faster
Approximate Singular Value Decomposition" (NeurIPS 2015, arXiv 1504.05477), Algorithm 2.
With A oriented so that it has its short side, s, as rows, and k = r + 8 columns:

    K_0 = orth(A Omega)                    Omega ~ N(0, 1)^{l x k}, from a fixed seed
    W_j = A^T K_j                          j = 0 ... 8, 18 thin products in all
    K_{j+1} = orth(A W_j against K_0 ... K_j)
    [W_0 ... W_8] = Q R,  R = X S Y^T      small: 9 k x 9 k
    left singular vectors ~ orth([K_0 ... K_8] Y[:, :r])
    right ones            ~ orth([W_0 ... W_8] Y[:, :r])

That is Rayleigh-Ritz, K^T A = R^T Q^T, whose products are there already. Nine blocks of
plain power iteration would leave 0.9^18 of a neighbour with 0.9 of the wanted singular
value; the polynomials of a Krylov space make it 1e-4.

Accuracy: the energy ||U^T A||^2 next to that of the exact leading r.

    sigma_{r+1} <= 0.9 sigma_r             at least 0.999
    flat and clustered spectra, noise      at least 0.98

`benchmarks/bench_svd.py` finds 0.9999 and 0.989 at least for r = 1 to 64 and s = 4096;
a longer short side makes it harder, slowly (0.9998 and 0.985 for s = 16 384).

The basis is orthonormal to round-off always, also of matrices that are rank-deficient
or zero: each block has Omega's own numbers added at the size of round-off, which are
orthonormalised where nothing else is left. Large and tiny numbers are scaled away in
the thin factors, so that A is never copied; beside it there are 9 k (m + n) numbers, a
few percent of a large matrix at small r.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_comm.numerics.device import on_device

OVERSAMPLED, BLOCKS = 8, 9
_SEED = 0


def columns_of_space(r: int) -> int:
    """Return the columns of the space in which r vectors are sought."""
    return BLOCKS * (r + OVERSAMPLED)


def leading_left_vectors(d: Tensor, r: int) -> Tensor:
    """Return an orthonormal basis that captures almost as much of d = U S V^T as U[:,
    :r] does; see the module's text for how much.

    Args:
        d: (B, m, n) with min(m, n) > columns_of_space(r), float32 or float64; a
            transposed view costs no more.
        r: number of vectors.

    Returns:
        (B, m, r), in about the order of the singular values; a function of each matrix
        alone. NaN or an error of torch.linalg.svd where d is not finite.

    Raises:
        torch.linalg.LinAlgError: the small decomposition does not converge.

    Example:
        >>> import torch
        >>> d = torch.diag(torch.cat([torch.ones(2), torch.full((98,), 0.5)]))[None]
        >>> u = leading_left_vectors(d, 2)
        >>> round(float((u.mT @ d).square().sum()), 4)
        2.0

    Source: see the module's text.
    """
    by_rows = d if d.stride(-1) == 1 else d.mT
    wanted_on_rows = by_rows is d
    on_rows = by_rows.shape[-2] <= by_rows.shape[-1]
    s, long = sorted(by_rows.shape[-2:])
    k = r + OVERSAMPLED
    # one draw for all matrices, whatever their batch
    generator = torch.Generator("cpu").manual_seed(_SEED)
    drawn = torch.randn((long, k), generator=generator, dtype=torch.float32, device="cpu")
    drawn = on_device(drawn, d.device).to(d.dtype)
    largest = torch.linalg.vector_norm(by_rows, torch.inf, dim=(-2, -1), keepdim=True)
    # not so small that its inverse, times a normal number, leaves the dtype's range
    scale = 1 / torch.where(largest > 0, largest, 1).clamp_min(64 * torch.finfo(d.dtype).tiny)

    def times(x: Tensor, transposed: bool) -> Tensor:
        """Return A x or A^T x, of A over its largest number."""
        x = x * scale
        if transposed == on_rows:
            # along the rows in memory, which is faster
            return (x.mT @ by_rows).mT
        return by_rows @ x.mT.contiguous().mT

    space = d.new_empty(len(d), s, 0)
    images = []
    block = times(drawn.expand(len(d), -1, -1), False)
    for j in range(BLOCKS):
        # of round-off's size, and other numbers for each block
        noise = drawn.roll(j + 1, 0)[:s] * (32 * torch.finfo(d.dtype).eps / s**0.5)
        block = _orthonormal_beside(space, block, noise)
        space = torch.cat([space, block], dim=-1)
        images.append(times(block, True))
        block = times(images[-1], False) if j + 1 < BLOCKS else block
    image = torch.cat(images, dim=-1)
    _, _, y = torch.linalg.svd(torch.linalg.qr(image, mode="r").R)
    found = (space if wanted_on_rows == on_rows else image) @ y.mT[..., :r]
    # float32's own QR of long columns is off by their length times its round-off
    return torch.linalg.qr(found.double()).Q.to(d.dtype)


def _orthonormal_beside(space: Tensor, block: Tensor, noise: Tensor) -> Tensor:
    """Return an orthonormal basis of the block without what lies in the orthonormal
    `space`; noise takes the place of what is missing in it.
    """
    norm = torch.linalg.vector_norm(block, dim=(-2, -1), keepdim=True)
    block = block / torch.where(norm > 0, norm, 1) + noise
    # once more, since dividing by what little is left amplifies round-off
    for _ in range(2):
        block = block - space @ (space.mT @ block)
        block = torch.linalg.qr(block).Q
    return block
