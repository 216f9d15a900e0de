"""The base optimizers of a comparison: AdamW, and Muon with AdamW for what Muon is not
made for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import AdamW, Optimizer

BaseName = Literal["adamw", "muon"]
MUON_MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.775, 2.0315)


@dataclass(frozen=True)
class Base:
    """A base optimizer and its numbers.

    Attributes:
        name: "adamw", or "muon" for Muon on the hidden matrices and AdamW on the rest.
        rate: highest learning rate. Muon's update is scaled to the size of AdamW's
            (0.2 sqrt(max(m, n)) for each step of an orthonormal matrix), so that both
            have one rate.
        beta2: of AdamW; beta1 is 0.9.
        weight_decay: of both.
    """

    name: BaseName
    rate: float
    beta2: float = 0.999
    weight_decay: float = 0.0


class Together(Optimizer):
    """Steps several optimizers as one; their parameter groups are its own, so that one
    schedule serves them all.
    """

    def __init__(self, *parts: Optimizer) -> None:
        self._parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self._parts:
            part.step()


def is_hidden(name: str, parameter: Tensor) -> bool:
    """Return whether Muon is made for the parameter: a matrix, but neither the
    embeddings nor the head.
    """
    return parameter.dim() == 2 and "embed" not in name and "lm_head" not in name


def base_optimizer(parameters: Mapping[str, Tensor], base: Base) -> Optimizer:
    """Return the base optimizer over named parameters."""
    if base.name == "adamw":
        return adamw(list(parameters.values()), base)
    hidden = [tensor for name, tensor in parameters.items() if is_hidden(name, tensor)]
    rest = [tensor for name, tensor in parameters.items() if not is_hidden(name, tensor)]
    parts: list[Optimizer] = [muon(hidden, base, MUON_MOMENTUM)] if hidden else []
    return Together(*parts, *([adamw(rest, base)] if rest else []))


def adamw(parameters: list[Tensor], base: Base) -> AdamW:
    """Return AdamW with the numbers of a base."""
    return AdamW(parameters, lr=base.rate, betas=(0.9, base.beta2), weight_decay=base.weight_decay)


def muon(matrices: list[Tensor], base: Base, momentum: float) -> Muon:
    """Return Muon with the numbers of a base; with momentum 0 it orthogonalizes what
    it is given.
    """
    return Muon(matrices, base.rate, base.weight_decay, momentum)


class Muon(Optimizer):
    """`torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`, in float32 and with matrices
    of one shape together: torch's products in bfloat16 take a CPU twenty times as long.

    B <- mu B + (1 - mu) g,  X <- X - 0.2 sqrt(max(m, n)) eta NS(mu B + (1 - mu) g)

    where NS are five steps of the quintic Newton-Schulz iteration.
    """

    def __init__(
        self, matrices: list[Tensor], rate: float, weight_decay: float, momentum: float
    ) -> None:
        super().__init__(matrices, {"lr": rate})
        self._weight_decay, self._momentum = weight_decay, momentum

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            shapes: dict[torch.Size, list[Tensor]] = {}
            for matrix in group["params"]:
                shapes.setdefault(matrix.shape, []).append(matrix)
            for shape, matrices in shapes.items():
                update = orthogonalized(torch.stack([self._update(one) for one in matrices]))
                rate = group["lr"] * 0.2 * math.sqrt(max(shape))
                for matrix, one in zip(matrices, update, strict=True):
                    matrix.mul_(1 - group["lr"] * self._weight_decay).sub_(one, alpha=rate)

    def _update(self, matrix: Tensor) -> Tensor:
        """Carry the momentum on, and return Nesterov's."""
        grad, state = matrix.grad, self.state[matrix]
        assert grad is not None
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(grad)
        return grad.lerp(state["momentum"].lerp_(grad, 1 - self._momentum), self._momentum)


def orthogonalized(x: Tensor) -> Tensor:
    """Return matrices (k, m, n) with singular values near 1: 0.7 to 1.2."""
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
