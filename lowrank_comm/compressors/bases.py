"""Orthonormal bases of the short side of matrices that several algorithms share: random ones, and those of a known mean
from which `greedy_choice` takes the columns that matter now.

The short side of an m x n matrix has s = min(m, n) dimensions, the long side l = max(m, n). A basis U on it, (B, s, c), is
on the right where n <= m, Delta V V^T, and on the left otherwise, V V^T Delta; `project` and `in_factors` hide that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .base import Context


def random_basis(context: Context, purpose: str, rows: int, columns: int, like: Tensor) -> Tensor:
    """Uniformly random orthonormal columns from (seed, name, t, purpose), equal on all workers.

    basis = orth(Z), Z ~ N(0, 1)^{rows x columns};  E basis basis^T = (columns / rows) I

    Args:
        context: of the batch.
        purpose: of the draw.
        rows, columns: of a basis, columns <= rows.
        like: its dtype and device are taken.

    Returns:
        (B, rows, columns). Factorised on the CPU in float64, so that workers on different devices agree.
    """
    wide = torch.empty(0, dtype=torch.float64, device="cpu")
    basis, _ = torch.linalg.qr(context.draw(purpose, (rows, columns), wide))
    return basis.to(like)
