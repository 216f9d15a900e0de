"""GradScaler and the compressed optimizer: whose scale a gradient carries, and how a veto reaches the scaler.

A plain `GradScaler` decides on each worker alone, and would skip `step()` on the one worker that overflowed while the
others wait in the collective. `CompressedOptimizer` therefore declares `_step_supports_amp_scaling`: the scaler then calls
`step()` on every worker and hands over `grad_scale` (None if the caller has unscaled). The veto of the reduction decides.

The error memory never holds the scale, which changes over time: gradients are unscaled before the reduction inside
`step()`, and a reduction before that (own clipping, or at the end of backward) needs to know the scaler, by `attach`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .errors import LowRankCommError


class LossScaling:
    """What the optimizer knows of a scaler.

    Args:
        key: id of the optimizer, under which a scaler files it.
    """

    def __init__(self, key: int) -> None:
        self._key = key
        self.scaler: Any = None

    def scale_of_gradients(self) -> float:
        """The loss scale that gradients carry outside `step()`: the attached scaler's while nobody has unscaled them."""
        if self.scaler is None or not self.scaler.is_enabled():
            return 1.0
        stage = self.scaler._per_optimizer_states[self._key]["stage"]
        return float(self.scaler.get_scale()) if stage.name == "READY" else 1.0

    def unscale(self, grad_scale: Tensor | None, parameters: Iterable[Tensor], reduced: bool) -> None:
        """Inside `step()`: take the scale out of the gradients, if the scaler says that it is still in them.

        Args:
            grad_scale: what the scaler handed over.
            parameters: whose gradients to unscale.
            reduced: whether they were averaged before.

        Raises:
            LowRankCommError: they were averaged with a scale in them that nobody knew of.
        """
        if grad_scale is None:
            return
        if reduced and self.scaler is None:
            raise LowRankCommError(
                "gradients were averaged before the scaler took the loss scale out of them, so the error memory got the "
                "scale. Call optimizer.attach(model, scaler=scaler) at the start, or scaler.unscale_(optimizer) before "
                "optimizer.reduce_gradients()."
            )
        grads = [p.grad for p in parameters if p.grad is not None]
        if grads:
            torch._foreach_div_(grads, float(grad_scale))

    def overflowed(self) -> None:
        """A veto is an overflow for the scaler of every worker, so that their scales stay equal."""
        if self.scaler is not None:
            for found in self.scaler._per_optimizer_states[self._key]["found_inf_per_device"].values():
                found.fill_(1.0)
