"""A run of one rank whose whole state can be compared bit by bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lowrank_comm import CompressedOptimizer
from lowrank_comm.compressors.base import Compressor
from tests.support.reference import gradient

SHAPES = {"tall": (12, 7), "twin": (12, 7), "wide": (7, 12), "bias": (5,)}

BAD_STEP, STEPS = 3, 7


def bits(value: Any) -> Any:
    """A nested state with every tensor as its bytes, so that == means equal
    bit by bit.
    """
    if isinstance(value, Tensor):
        return (
            value.dtype,
            tuple(value.shape),
            value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
    if isinstance(value, dict):
        return {key: bits(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [bits(part) for part in value]
    return value


class Run:
    """A model of four parameters under Adam, on one rank."""

    def __init__(
        self, compressor: Compressor, dtype: torch.dtype = torch.float32, **options: Any
    ) -> None:
        self.model = torch.nn.ParameterDict(
            {name: torch.zeros(shape, dtype=dtype) for name, shape in SHAPES.items()}
        )
        self.parameters = dict(self.model.named_parameters())
        self.optimizer = CompressedOptimizer(
            torch.optim.Adam(self.model.named_parameters(), lr=0.1),
            compressor=compressor,
            min_compression_rate=0,
            **options,
        )

    def give(self, step: int, rank: int, factor: float = 1.0) -> None:
        for k, p in enumerate(self.parameters.values()):
            p.grad = (
                torch.as_tensor(gradient(tuple(p.shape), step, rank, k), dtype=p.dtype) * factor
            )

    def state(self) -> Any:
        """Everything that a veto must leave alone: parameters, error memory, bases,
        counters, the base optimizer's state.
        """
        return bits(
            {
                "parameters": {name: p.data for name, p in self.parameters.items()},
                "errors": self.optimizer.error_memory(),
                "optimizer": self.optimizer.state_dict(),
            }
        )
