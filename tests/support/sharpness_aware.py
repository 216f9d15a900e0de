"""Sharpness-aware minimisation, as implementations have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


class SharpnessAware(torch.optim.Optimizer):
    """Climbs along the gradient, takes the gradient there, comes back, steps."""

    def __init__(self, params: Any, inner: Callable[[Any], torch.optim.Optimizer]) -> None:
        super().__init__(params, {})
        self.inner = inner(self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if closure is None:
            raise RuntimeError("it needs a closure")
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [p.clone() for p in parameters]
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        for p in parameters:
            p.add_(p.grad * (0.05 / norm))
        self.zero_grad()
        with torch.enable_grad():
            loss = closure()
        for p, value in zip(parameters, before, strict=True):
            p.copy_(value)
        self.inner.step()
        return loss


class InTwoCalls(torch.optim.Optimizer):
    """Sharpness-aware minimisation as most write it: the caller computes the gradients
    between the calls.
    """

    def __init__(self, params: Any) -> None:
        super().__init__(params, {})
        self.inner = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.9)

    def _parameters(self) -> list[Any]:
        return [p for group in self.param_groups for p in group["params"] if p.grad is not None]

    @torch.no_grad()
    def first_step(self, zero_grad: bool = False) -> None:
        norm = torch.stack([p.grad.norm() for p in self._parameters()]).norm() + 1e-12
        for p in self._parameters():
            self.state[p]["before"] = p.clone()
            p.add_(p.grad * (0.05 / norm))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad: bool = False) -> None:
        for p in self._parameters():
            p.copy_(self.state[p]["before"])
        self.inner.step()
        if zero_grad:
            self.zero_grad()

    def step(self, closure: Any = None) -> None:
        raise RuntimeError("it has two")
