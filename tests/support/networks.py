"""A small network, its data, and compressed optimizers around every base."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_comm import CompressedOptimizer, PowerSGD
from lowrank_comm.compressors.base import Compressor
from tests.support.reference import gradient

Builder = Callable[[Iterable[Any]], torch.optim.Optimizer]

BASES: dict[str, Builder] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "MSGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, amsgrad=True),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
}

every_base = pytest.mark.parametrize("base", BASES)


def network(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 6)).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(0.4 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model


def batch(step: int, worker: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x, y = gradient((8, 10), step, worker, 1), gradient((8, 6), step, worker, 2)
    return torch.as_tensor(x, dtype=dtype), torch.as_tensor(y, dtype=dtype)


def loss_of(model: nn.Module, step: int, worker: int = 0) -> Tensor:
    x, y = batch(step, worker, next(model.parameters()).dtype)
    return ((model(x) - y) ** 2).mean()


def compressed(
    model: nn.Module,
    base: Builder = BASES["MSGD"],
    compressor: Compressor | None = None,
    **options: Any,
) -> CompressedOptimizer:
    return CompressedOptimizer(
        base(model.named_parameters()),
        compressor=compressor or PowerSGD(2),
        **({"min_compression_rate": 0} | options),
    )


def distance(one: nn.Module, other: nn.Module) -> float:
    return max(
        float((p - q).detach().abs().max())
        for p, q in zip(one.parameters(), other.parameters(), strict=True)
    )
