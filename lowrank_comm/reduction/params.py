"""One parameter as this rank holds it: name, shape, dtype, device, and its block of
rows.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_comm.communication.intra_node import IntraNodeGroup


@dataclass(frozen=True)
class ParamInfo:
    """One parameter, or the block of it that this rank holds.

    Attributes:
        name: in the model.
        shape: of what this rank holds.
        dtype: of its gradient.
        device: of the computation.
        whole: shape of the whole parameter, of which the ranks of a node hold blocks;
            None where this is all of it.
        dim: along which it is cut into blocks.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    whole: tuple[int, ...] | None = None
    dim: int = 0

    @functools.cached_property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def block(self, intra_node: IntraNodeGroup, rank: int) -> tuple[int, ...]:
        """Return the shape of the block that rank `rank` of the node holds; rank 0
        holds the largest.
        """
        if self.whole is None:
            return self.shape
        held = intra_node.block(self.whole[self.dim], rank)
        return (*self.whole[: self.dim], held.stop - held.start, *self.whole[self.dim + 1 :])

    @functools.cached_property
    def compute_dtype(self) -> torch.dtype:
        """The wider of float32 and the parameter's dtype."""
        return torch.promote_types(self.dtype, torch.float32)


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """Return the dtype that a parameter's gradient must have: its own, unless
    `grad_dtype` (torch 2.10 and later) says otherwise.
    """
    return getattr(parameter, "grad_dtype", None) or parameter.dtype
