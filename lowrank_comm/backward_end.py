"""Watches backward passes: tells of every new gradient, and runs a function when all gradients of a pass are final.

A hook on each parameter queues a callback with the autograd engine at the first gradient of a pass. The callback queues
another one, which runs after the callbacks that engines such as DDP queue for themselves. A pass that ends by an
exception never runs its callbacks; the next pass is told from it by its number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


class BackwardWatch:
    """Calls `on_gradient(parameter)` for each gradient, and `at_end()` once at the end of each backward pass.

    Args:
        parameters: whose gradients count.
        on_gradient: called when a parameter's gradient has been accumulated.
        at_end: called when the pass is over, or None.
    """

    def __init__(
        self, parameters: Iterable[Tensor], on_gradient: Callable[[Tensor], None], at_end: Callable[[], None] | None = None
    ) -> None:
        self._on_gradient, self._at_end = on_gradient, at_end
        self._queued_in: int | None = None
        self._watched: set[int] = set()
        self.add(parameters)

    def add(self, parameters: Iterable[Tensor]) -> None:
        """Watch further parameters; those that are watched already stay as they are."""
        for parameter in parameters:
            if id(parameter) not in self._watched and parameter.requires_grad:
                self._watched.add(id(parameter))
                parameter.register_post_accumulate_grad_hook(self._gradient_is_there)

    def _gradient_is_there(self, parameter: Tensor) -> None:
        self._on_gradient(parameter)
        this_pass = torch._C._current_graph_task_id()
        if self._at_end is not None and self._queued_in != this_pass:
            self._queued_in = this_pass
            queue = torch.autograd.Variable._execution_engine.queue_callback
            queue(lambda: queue(self._finish))

    def _finish(self) -> None:
        self._queued_in = None
        if self._at_end is not None:
            self._at_end()
