"""Compressors, shapes and matrices for the tests of what a reduction keeps."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lowrank_comm import PowerSGD, PowerSGDPlus
from lowrank_comm.simulation import Simulation
from tests.support.reference import gradient

COMPRESSORS = [
    PowerSGD(2),
    PowerSGDPlus(2, restart_every=3),
    PowerSGDPlus(2, restart_every=3, restart="randomized"),
    PowerSGDPlus(2, restart_every=3, exact_restart=True),
    PowerSGDPlus(2, restart_every=3, consensus_restart=True),
    PowerSGDPlus(2, restart_every=3, stagger=True),
]

every_compressor = pytest.mark.parametrize("compressor", COMPRESSORS, ids=repr)

SHAPES = {"tall": (12, 7), "wide": (7, 12), "filter": (6, 3, 2, 2), "bias": (5,), "scale": ()}


def drawn(
    step: int,
    worker: int,
    shapes: dict[str, tuple[int, ...]] = SHAPES,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Tensor]:
    return {
        name: torch.as_tensor(gradient(shape, step, worker, k), dtype=dtype)
        for k, (name, shape) in enumerate(shapes.items())
    }


def apply(sim: Simulation, matrix: Tensor) -> Tensor:
    """One step of a simulation that holds one matrix, called w, in one worker."""
    return sim.reduce([{"w": matrix.clone()}])["w"]


def low_rank(m: int, n: int, rank: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(m, rank, generator=generator, dtype=torch.float64)
        @ torch.randn(rank, n, generator=generator, dtype=torch.float64)
    ).to(dtype)


def relative(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())
