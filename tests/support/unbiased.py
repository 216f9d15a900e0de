"""Draws of unbiased compressors, and their moments."""

from __future__ import annotations

import torch
from torch import Tensor

DRAWS = 20_000

V = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 0.25, 2.0, -0.5, 1.5, -3.0], dtype=torch.float64)

D = len(V)


def moments(draws: Tensor) -> tuple[float, float]:
    """Largest deviation of the mean from V in standard errors, and the measured omega.
    draws: (DRAWS, D).
    """
    error = (draws.std(dim=0) / len(draws) ** 0.5).clamp_min(1e-12)
    deviation = ((draws.mean(dim=0) - V).abs() / error).max()
    return float(deviation), float((draws - V).square().sum(dim=1).mean() / V.square().sum())
