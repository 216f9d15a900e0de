"""Bases on one side of a matrix: drawn without a gradient, and what the projection on
one sends.
"""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import torch
from torch import Tensor

from lowrank_comm.compressors.base import Context, Delta, LowRank
from lowrank_comm.compressors.requests import Mean, Request


def random_basis(context: Context, purpose: str, rows: int, r: int, like: Tensor) -> Tensor:
    """orth of a Gaussian matrix from (seed, name, t, purpose): its range is uniformly
    distributed, E P P^T = (r / rows) I.

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
    return torch.linalg.qr(drawn).Q.to(like)


def project(
    delta: Delta, v: Tensor, on_rows: bool, rows: slice = slice(None), kind: str = "factors"
) -> Generator[Request, Any, tuple[LowRank, LowRank]]:
    """The projection of the mean of Delta on V's range, F V^T with F = mean of Delta_i
    V, and this worker's own as sent; V F^T with F = mean of Delta_i^T V where V is on
    the side of the rows. One average.

    Args:
        delta: (B, m, n), or the rows of it that this rank holds.
        v: (B, s, r), all of it on every rank.
        on_rows: V is on the side of the rows, s = m; else s = n.
        rows: those that this rank holds.
        kind: of the ledger.
    """
    if on_rows:
        part = v[:, rows]
        mean, own = yield Mean(delta.transposed_times(part), kind, over_rows=True)
        return LowRank(part, mean), LowRank(part, own)
    mean, own = yield Mean(delta.times(v), kind)
    return LowRank(mean, v), LowRank(own, v)
