"""GradScaler and the compressed optimizer: whose scale a gradient carries, and how a
veto reaches the scaler.

A plain `GradScaler` decides on each worker alone, and would skip `step()` on the one
worker that overflowed while the others wait in the collective. `CompressedOptimizer`
therefore declares `_step_supports_amp_scaling`: the scaler then calls `step()` on every
worker and hands over `grad_scale` (None if the caller has unscaled). The veto of the
reduction decides.

The error memory never holds the scale, which changes over time: gradients are unscaled
before the reduction inside `step()`. A program that reduces before that (to clip, or at
the end of backward) must make the scaler known by `attach`.
"""

from __future__ import annotations

from typing import Any

import torch

from lowrank_comm.errors import LowRankCommError
from lowrank_comm.optimizer.wrapper import parameters_of


class LossScaling:
    """What the optimizer knows of a scaler.

    Args:
        key: id of the optimizer, under which a scaler files it.
    """

    def __init__(self, key: int) -> None:
        self._key = key
        self.scaler: Any = None
        # of a scaler that is not known, when it last called step()
        self._seen = 1.0

    def attach(self, scaler: Any) -> None:
        """Make a scaler known; one that is switched off is none."""
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None

    @property
    def known_scale(self) -> float:
        """The loss scale that is in use; 1 where none is known."""
        return float(self.scaler.get_scale()) if self.scaler is not None else self._seen

    def scale_of_gradients(self) -> float:
        """Return the loss scale that gradients carry outside `step()`: the attached
        scaler's as long as they have not been unscaled.
        """
        if self.scaler is None or self._filed("stage").name != "READY":
            return 1.0
        return float(self.scaler.get_scale())

    def unscale(self, optimizer: Any, reduced: bool) -> None:
        """Take the scale out of the gradients, if it is still in them; called inside a
        `step()` that a scaler calls.

        Args:
            optimizer: whose gradients to unscale, and on which the scaler has left
                `grad_scale` (None after `scaler.unscale_`).
            reduced: whether they were averaged before.

        Raises:
            LowRankCommError: they were averaged before the scaler was known, hence
                perhaps with the scale in them.
        """
        if reduced and self.scaler is None:
            raise LowRankCommError(
                "a GradScaler calls step(), but the gradients were averaged before when nobody knew"
                " of it: the error memory may have got the loss scale. Call optimizer.attach(model,"
                " scaler=scaler) at the start."
            )
        parameters = parameters_of(optimizer)
        if self.scaler is not None:
            found = self._filed("found_inf_per_device")
            # this worker has no gradients, others may; the scaler wants to have looked
            # at some
            if not found:
                for device in {p.device for p in parameters}:
                    found[device] = torch.zeros((), device=device)
        grads = [p.grad for p in parameters if p.grad is not None]
        if optimizer.grad_scale is not None and grads:
            self._seen = float(optimizer.grad_scale)
            torch._foreach_div_(grads, self._seen)

    def overflowed(self) -> None:
        """Record a veto as an overflow for the scaler of every worker, so that their
        scales stay equal.
        """
        if self.scaler is not None:
            for found in self._filed("found_inf_per_device").values():
                found.fill_(1.0)

    def _filed(self, what: str) -> Any:
        """Return what the attached scaler keeps of this optimizer since its last
        update.
        """
        return self.scaler._per_optimizer_states[self._key][what]
