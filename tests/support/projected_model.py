"""Parameters and a model for the projected optimizers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lowrank_comm.projected.optimizer import ProjectedOptimizer
from tests.support.reference import gradient

SHAPES = {"tall": (12, 7), "wide": (7, 12), "square": (9, 9)}


def parameters(dtype: torch.dtype = torch.float64) -> dict[str, nn.Parameter]:
    """Three matrices, a vector and a filter."""
    shapes = {**SHAPES, "bias": (5,), "filter": (6, 3, 2, 2)}
    return {
        name: nn.Parameter(torch.as_tensor(gradient(shape, 99, 0, k), dtype=dtype))
        for k, (name, shape) in enumerate(shapes.items())
    }


def give(held: dict[str, nn.Parameter], t: int, worker: int = 0) -> None:
    for k, p in enumerate(held.values()):
        p.grad = torch.as_tensor(gradient(tuple(p.shape), t, worker, k), dtype=p.dtype)


def run(
    optimizer: ProjectedOptimizer, held: dict[str, nn.Parameter], steps: int, first: int = 0
) -> list[dict[str, Tensor]]:
    history = []
    for t in range(first, first + steps):
        give(held, t)
        optimizer.step()
        history.append({name: p.detach().clone() for name, p in held.items()})
    return history


def model(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    generator = torch.Generator().manual_seed(3)
    net = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 8)).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return net


def loss_of(net: nn.Module, t: int) -> Tensor:
    dtype = next(net.parameters()).dtype
    x, y = (torch.as_tensor(gradient(shape, t, 0, 5), dtype=dtype) for shape in ((16, 10), (16, 8)))
    return (net(x) - y).square().mean()
