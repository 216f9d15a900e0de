"""Random subspaces."""

from __future__ import annotations

import torch

from lowrank_comm.compressors.base import Context
from lowrank_comm.compressors.subspaces import random_basis


def test_the_random_basis_is_uniform() -> None:
    """E P P^T = (r / s) I: 4 000 draws."""
    names = tuple(f"draw{k}" for k in range(4000))
    p = random_basis(Context(names, 0, 0, 2), "test", 6, 2, torch.empty(0, dtype=torch.float64))
    torch.testing.assert_close(
        p.mT @ p, torch.eye(2, dtype=torch.float64).expand(4000, 2, 2), rtol=0, atol=1e-12
    )
    projectors = p @ p.mT
    error = projectors.std(0) / len(names) ** 0.5
    # of 36 entries
    assert float(((projectors.mean(0) - torch.eye(6) / 3).abs() / error).max()) < 4.5
