"""Runs a function at the end of every backward pass, when all gradients are final.

A hook on each parameter queues a callback with the autograd engine at the first gradient of a backward pass. The
callback queues another one, which runs after the callbacks that engines such as DDP queue for themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class EndOfBackward:
    """Calls `action` once at the end of each backward pass in which a gradient of `parameters` was computed."""

    def __init__(self, parameters: Iterable[Tensor], action: Callable[[], None]) -> None:
        self._action = action
        self._queued = False
        self._handles = [p.register_post_accumulate_grad_hook(self._gradient_is_there) for p in parameters]

    def _gradient_is_there(self, _: Tensor) -> None:
        if not self._queued:
            self._queued = True
            queue = torch.autograd.Variable._execution_engine.queue_callback
            queue(lambda: queue(self._finish))

    def _finish(self) -> None:
        self._queued = False
        self._action()

    def remove(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()
