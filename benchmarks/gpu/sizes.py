"""The models whose steps are measured: LLaMAs of three sizes; on a CPU a small one."""

from __future__ import annotations

import torch
from torch import nn

from benchmarks.gpu.device import Device
from benchmarks.sides import Model

SEED = 0
MODELS = (
    Model("20M", 512, 6, 1376, 4096),
    Model("350M", 1024, 24, 2736, 32000),
    Model("1.3B", 2048, 24, 5461, 32000),
)
MEDIUM = MODELS[1]
"""Of launches, waits and memory."""
SMALL = Model("small", 160, 4, 432, 512)
"""In the place of all on a CPU, which tries the checks and measures nothing."""


def shapes_of(model: Model, device: Device) -> list[tuple[int, ...]]:
    """Return the shapes of all parameters, in the model's order."""
    return (model if device.is_gpu else SMALL).shapes()


def parameters_of(shapes: list[tuple[int, ...]], device: Device) -> list[nn.Parameter]:
    """Return parameters of these shapes, all zero."""
    return [nn.Parameter(torch.zeros(shape, device=device.device)) for shape in shapes]
