"""Shapes and runs of compressors that project on a subspace which they keep for a
period.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lowrank_comm import CompressedOptimizer
from lowrank_comm.communication.topology import grid
from lowrank_comm.compressors.base import Compressor
from tests.support.projections import given

SHAPES = {"tall": (12, 7), "wide": (7, 12), "square": (9, 9)}


def all_given(t: int, workers: int) -> dict[str, list[Tensor]]:
    return {name: given(shape, t, workers) for name, shape in SHAPES.items()}


def train(rank: int, compressor: Compressor, wire: str | None) -> list[dict[str, Tensor]]:
    """Seven steps; what is applied."""
    parameters = {
        name: torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        for name, shape in SHAPES.items()
    }
    optimizer = CompressedOptimizer(
        torch.optim.SGD(parameters.items(), lr=0.1),
        compressor,
        min_compression_rate=0,
        wire_dtype=wire,
    )
    history = []
    for t in range(7):
        for name, shape in SHAPES.items():
            parameters[name].grad = given(shape, t, rank + 1)[rank]
        assert optimizer.reduce_gradients()
        history.append({name: p.grad.clone() for name, p in parameters.items()})
        optimizer.step()
    return history


def blocks_of_rows(rank: int, compressor: Compressor) -> list[dict[str, Tensor]]:
    """Two nodes of two ranks, whole matrices in blocks of rows; each rank has half of
    its node's gradient.
    """
    parameters = {
        name: torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        for name, shape in SHAPES.items()
    }
    optimizer = CompressedOptimizer(
        torch.optim.SGD(parameters.items(), lr=0.1),
        compressor,
        grid(2),
        min_compression_rate=0,
        shard_scope="matrix",
    )
    history = []
    for t in range(5):
        for name, shape in SHAPES.items():
            parameters[name].grad = given(shape, t, 4)[rank]
        optimizer.reduce_gradients()
        history.append({name: p.grad.clone() for name, p in parameters.items()})
        optimizer.step()
    return history
