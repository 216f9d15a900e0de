"""Bases that need no gradient: what the schemes that draw their subspace share."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Context


def random_basis(context: Context, purpose: str, rows: int, r: int, like: Tensor) -> Tensor:
    """orth of a Gaussian matrix from (seed, name, t, purpose): its range is uniformly distributed, E P P^T = (r / rows) I.

    Args:
        context: of the batch, whose names and t are part of the key.
        purpose: what the basis is for; part of the key.
        rows: of the basis.
        r: its columns, r <= rows.
        like: of whose dtype and device the result is.

    Returns:
        (B, rows, r) orthonormal, equal on all workers. Orthonormalised on the CPU in float64 where it is drawn, so that
        the result does not depend on the device; by Householder QR, which needs no rule for dead columns.
    """
    drawn = context.draw(purpose, (rows, r), torch.empty(0, dtype=torch.float64, device="cpu"))
    return torch.linalg.qr(drawn).Q.to(like)
