"""The trainable parameters of an optimizer as one vector of d numbers, in the order of
the groups.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lowrank_comm.bidirectional.refusals import refuse_parameter
from lowrank_comm.errors import ConfigError
from lowrank_comm.reduction.gradients import unusable_of


class FlatParameters:
    """Reads and writes a list of parameters, or their gradients, as one vector.

    Args:
        named: (name, parameter), float32 or float64, on one device.

    Raises:
        ConfigError: no parameter, a narrower dtype, several devices, or two parameters
            of one name.
        UnsupportedError: a parameter that an engine has cut into shards.
    """

    def __init__(self, named: Sequence[tuple[str, Tensor]]) -> None:
        if not named:
            raise ConfigError(
                "no parameter of the optimizer requires a gradient; there is nothing to train."
            )
        for name, parameter in named:
            refuse_parameter(name, parameter)
            if parameter.dtype not in (torch.float32, torch.float64):
                raise ConfigError(
                    f"parameter {name!r} is {parameter.dtype}: the server adds small steps to x for"
                    " the whole run, which a narrow dtype would round away. Keep the parameters in"
                    " float32 and compute under torch.autocast."
                )
            if parameter.device != named[0][1].device:
                raise ConfigError(
                    f"parameter {name!r} is on {parameter.device}, {named[0][0]!r} on"
                    f" {named[0][1].device}; a worker's point is one vector on one device."
                )
        self.names = [name for name, _ in named]
        if len(set(self.names)) < len(self.names):
            twice = next(name for name in self.names if self.names.count(name) > 1)
            raise ConfigError(f"two parameters are called {twice!r}; give each its own name.")
        self.parameters = [parameter for _, parameter in named]
        self.dtype = max((p.dtype for p in self.parameters), key=lambda dtype: dtype.itemsize)
        self.device = self.parameters[0].device
        self.sizes = [p.numel() for p in self.parameters]

    @property
    def d(self) -> int:
        """Number of coordinates."""
        return sum(self.sizes)

    @property
    def shapes(self) -> dict[str, list[int]]:
        """Parameter name -> shape, in order."""
        pairs = zip(self.names, self.parameters, strict=True)
        return {name: list(p.shape) for name, p in pairs}

    def read(self) -> Tensor:
        """Return a copy of the parameters, (d,)."""
        return torch.cat([p.detach().reshape(-1).to(self.dtype) for p in self.parameters])

    def gradients(self) -> Tensor:
        """Return a copy of the gradients, (d,); zero for a parameter that has none, NaN
        for one that cannot be averaged.
        """
        unusable, parts = self.unusable_gradients(), []
        for name, p in zip(self.names, self.parameters, strict=True):
            gradient = torch.zeros_like(p) if p.grad is None else p.grad
            if name in unusable:
                gradient = torch.full_like(p, math.nan)
            parts.append(gradient.reshape(-1).to(self.dtype))
        return torch.cat(parts)

    def unusable_gradients(self) -> dict[str, str]:
        """Return parameter name -> what is wrong with its gradient."""
        return unusable_of(zip(self.names, self.parameters, strict=True))

    def shaped(self, vector: Tensor) -> dict[str, Tensor]:
        """Return a vector as tensors by name, in the parameters' shapes and dtypes."""
        pieces = zip(self.names, self.parameters, vector.split(self.sizes), strict=True)
        return {name: piece.view_as(p).to(p.dtype) for name, p, piece in pieces}

    @torch.no_grad()
    def write(self, vector: Tensor) -> None:
        """Copy a vector, (d,), into the parameters."""
        for p, piece in zip(self.parameters, vector.split(self.sizes), strict=True):
            p.copy_(piece.view_as(p))

    def write_gradients(self, vector: Tensor) -> None:
        """Set the parameters' `.grad` to a vector, (d,), in tensors of their own."""
        for p, piece in zip(self.parameters, vector.split(self.sizes), strict=True):
            p.grad = piece.view_as(p).to(p.dtype).clone()
