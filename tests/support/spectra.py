"""Matrices with given singular values, and the share of their energy that a
step applies.
"""

from __future__ import annotations

import numpy as np
import torch

from lowrank_comm.compressors.base import Compressor
from tests.support.driver import simulation

SPECTRA = {
    "1/k": lambda count: 1.0 / np.arange(1, count + 1),
    "1/sqrt k": lambda count: np.arange(1, count + 1) ** -0.5,
    "0.7^k": lambda count: 0.7 ** np.arange(count),
    "flat": np.ones,
}


def captured(compressor: Compressor, matrix: np.ndarray, draws: int) -> np.ndarray:
    """Share of the energy that the first step applies, for `draws` independent draws:
    one batch of equal matrices with names of their own.
    """
    names = [f"draw{k}" for k in range(draws)]
    given = torch.from_numpy(matrix)
    applied = simulation(compressor, dict.fromkeys(names, matrix.shape), 1).reduce(
        [{name: given.clone() for name in names}]
    )
    return np.array([float(applied[name].norm() ** 2 / given.norm() ** 2) for name in names])
