"""Sharpness-aware minimisation (SAM) in two calls, `first_step()` and `second_step()`,
by the names that all implementations have given them.

    first_step()    the base climbs along the averaged gradients of the weights
    second_step()   it comes back, and steps with the averaged gradients found up there

Both average; the error memory is about the second gradients only, so the first pass is
given up. After a veto in either, all workers stay where they were.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lowrank_comm.optimizer.backward_reduction import BackwardReduction
from lowrank_comm.optimizer.wrapper import parameters_of


class SharpnessAware:
    """Averages the gradients in the two calls of a sharpness-aware base.

    Args:
        base: the optimizer that has the two methods, or none of them.
        backward: whose pass is given up, or made true.
    """

    def __init__(self, base: Optimizer, backward: BackwardReduction) -> None:
        self._base, self._backward = base, backward
        # parameters before the climb
        self._before: list[Tensor] = []

    def call(self, name: str, value: Any, owner: Any) -> Any:
        """Return what stands for the base's attribute `name`: for one of the two calls
        a function that averages first, for all others the attribute itself.

        Args:
            name, value: of the attribute.
            owner: the wrapper, which averages, clips and clears gradients.
        """
        calls = {"first_step": self._first_step, "second_step": self._second_step}
        if name in calls and all(callable(getattr(self._base, one, None)) for one in calls):
            return functools.partial(calls[name], owner, value)
        return value

    def _first_step(self, owner: Any, climb: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Let the base climb along the averaged gradients; a collective."""
        if not owner.reduce_gradients():
            # all workers stay where they are
            for parameter in parameters_of(self._base):
                if parameter.grad is not None:
                    parameter.grad.zero_()
        self._before = [p.detach().clone() for p in parameters_of(self._base)]
        result = climb(*args, **kwargs)
        self._backward.forget()
        return result

    def _second_step(
        self, owner: Any, descend: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Let the base come back and step with the averaged gradients; a collective. A
        veto puts the parameters back to where they were before the first step.
        """
        before, self._before = self._before, []
        if owner._average():
            owner._clip()
            self._backward.settle(stepping=True)
            return descend(*args, **kwargs)
        with torch.no_grad():
            for parameter, value in zip(parameters_of(self._base), before, strict=False):
                parameter.copy_(value)
        if True in (*args[:1], kwargs.get("zero_grad")):
            owner.zero_grad()
        return None
