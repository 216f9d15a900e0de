"""Watches backward passes: tells of every new gradient, and runs a function when all gradients of a pass are final.

A hook on each parameter queues a callback with the autograd engine at the first gradient of a pass. The callback queues
another one, which runs after the callbacks that engines such as DDP queue for themselves. A pass that ends by an
exception never runs its callbacks; the next pass is told from it by its number.

Activation checkpointing with use_reentrant=True runs a backward pass of its own for each checkpointed part, inside the
outer one. Its end is not the end of anything, and the outer pass's end cannot be seen from there, so it is refused.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from .errors import ConfigError, UnsupportedError

_WATCHED = "_lowrank_comm_reduces_at_backward"
_BACKWARD_OF_A_FUNCTION = torch.autograd.function.BackwardCFunction.apply.__code__


class BackwardWatch:
    """Calls `on_gradient(parameter)` for each gradient, and `at_end()` once at the end of each backward pass.

    The object whose methods they are is kept alive by `at_end` only: without it nothing is lost when the object is gone,
    with it a reduction would be.

    Args:
        parameters: whose gradients count.
        on_gradient: called when a parameter's gradient has been accumulated.
        at_end: called when the pass is over, or None.
    """

    def __init__(
        self, parameters: Iterable[Tensor], on_gradient: Callable[[Tensor], None], at_end: Callable[[], None] | None = None
    ) -> None:
        self._on_gradient = weakref.WeakMethod(on_gradient)
        self._at_end = at_end
        self._queued_in: int | None = None
        self._watched: set[int] = set()
        self._handles: list[Any] = []
        self.add(parameters)

    def add(self, parameters: Iterable[Tensor]) -> None:
        """Watch further parameters; those that are watched already stay as they are."""
        fresh = [p for p in parameters if p.requires_grad and id(p) not in self._watched]
        if self._at_end is not None and any(getattr(parameter, _WATCHED, False) for parameter in fresh):
            raise ConfigError(
                'reduce_at="backward": another optimizer with reduce_at="backward" holds the same parameters, and both '
                "would average their gradients. Call detach() on the other one first."
            )
        for parameter in fresh:
            if self._at_end is not None:
                setattr(parameter, _WATCHED, True)
            self._watched.add(id(parameter))
            self._handles.append((parameter, parameter.register_post_accumulate_grad_hook(self._gradient_is_there)))

    def remove(self) -> None:
        """Take the hooks off."""
        for parameter, handle in self._handles:
            handle.remove()
            if self._at_end is not None:
                setattr(parameter, _WATCHED, False)
        self._handles.clear()
        self._watched.clear()

    def _gradient_is_there(self, parameter: Tensor) -> None:
        on_gradient = self._on_gradient()
        if on_gradient is None:
            return
        on_gradient(parameter)
        this_pass = torch._C._current_graph_task_id()
        if self._at_end is not None and self._queued_in != this_pass:
            self._queued_in = this_pass
            queue = torch.autograd.Variable._execution_engine.queue_callback
            queue(lambda: queue(self._finish))

    def _finish(self) -> None:
        self._queued_in = None
        if self._at_end is None:
            return
        if _within_another_pass():
            raise UnsupportedError(
                'reduce_at="backward" with reentrant activation checkpointing: each checkpointed part has a backward pass '
                "of its own, and gradients would be averaged at the end of each. Use checkpoint(..., use_reentrant=False) "
                '(Trainer: gradient_checkpointing_kwargs={"use_reentrant": False}), or reduce_at="step".'
            )
        self._at_end()


def _within_another_pass() -> bool:
    """Whether this backward pass was started by the backward of a custom function, hence inside another pass."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is _BACKWARD_OF_A_FUNCTION:
            return True
        frame = frame.f_back
    return False
