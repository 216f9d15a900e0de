"""Watches backward passes: tells of every new gradient, and runs a function when all
gradients of a pass are final.

A hook on each parameter queues a callback with the autograd engine at the first
gradient of a pass. The callback queues another one, which runs after the callbacks that
engines such as DDP queue for themselves. A pass that ends by an exception never runs
its callbacks; the next pass is told from it by its number.

Activation checkpointing with use_reentrant=True runs a backward pass of its own for
each checkpointed part, inside the outer one. Its end is not the end of anything, and
the outer pass's end cannot be seen from there, so it is refused.
"""

from __future__ import annotations

import sys
import traceback
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from lowrank_comm.errors import ConfigError, UnsupportedError

# not on the parameters, which people copy and pickle
_averaged_by: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Parameter -> weak reference to the watch at whose end its gradient is averaged."""
_BACKWARD_OF_A_FUNCTION = torch.autograd.function.BackwardCFunction.apply.__code__


class BackwardWatch:
    """Calls `on_gradient(parameter)` for each gradient, and `at_end()` once at the end
    of each backward pass.

    It holds weak references only: the garbage collector cannot see cycles through
    autograd hooks, so a hook that held the object whose methods these are, and by it
    the parameters, would keep both alive for ever. When the watch is gone, so are its
    hooks.

    Args:
        parameters: whose gradients count.
        on_gradient: called when a parameter's gradient has been accumulated.
        at_end: called when the pass is over, or None.

    Attributes:
        give_way: called when another watch is to run at the end of the same parameters'
            passes; returns whether this one was removed for it.

    Raises:
        ConfigError: a parameter is no leaf of the graph, or belongs to another watch.
    """

    def __init__(
        self,
        parameters: Iterable[Tensor],
        on_gradient: Callable[[Tensor], None],
        at_end: Callable[[], None] | None = None,
    ) -> None:
        self._on_gradient = weakref.WeakMethod(on_gradient)
        self._at_end = weakref.WeakMethod(at_end) if at_end is not None else None
        self.give_way: Callable[[], bool] = lambda: False
        self._queued_in: int | None = None
        self._handles: dict[int, tuple[weakref.ref[Tensor], Any]] = {}
        self._finalizer = weakref.finalize(self, _take_off, self._handles)
        self._finalizer.atexit = False
        self.add(parameters)

    def add(self, parameters: Iterable[Tensor]) -> None:
        """Watch further parameters; those that are watched already stay as they are."""
        fresh = [p for p in parameters if p.requires_grad and not self._watches(p)]
        for parameter in fresh:
            if not parameter.is_leaf:
                raise ConfigError(
                    f"a parameter of shape {tuple(parameter.shape)} is computed from other tensors"
                    " (it is not a leaf, as with differentiable=True), so no gradient of its own"
                    " can be averaged. Give the optimizer the tensors that it is computed from."
                )
            if self._at_end is not None:
                _let_go(parameter)
        me = weakref.ref(self)

        def hook(parameter: Tensor) -> None:
            watch = me()
            if watch is not None:
                watch._gradient_is_there(parameter)

        for parameter in fresh:
            if self._at_end is not None:
                _averaged_by[parameter] = me
            self._handles[id(parameter)] = (
                weakref.ref(parameter),
                parameter.register_post_accumulate_grad_hook(hook),
            )

    def _watches(self, parameter: Tensor) -> bool:
        known = self._handles.get(id(parameter))
        # else it is gone, and another has its place in memory
        return known is not None and known[0]() is parameter

    def move_to_the_end(self, parameter: Tensor) -> None:
        """Let the hook run after those that users have placed since."""
        there, handle = self._handles[id(parameter)]
        # of the function itself: the order is that of registration
        hook = (parameter._post_accumulate_grad_hooks or {})[handle.id]
        handle.remove()
        self._handles[id(parameter)] = (there, parameter.register_post_accumulate_grad_hook(hook))

    def remove(self) -> None:
        """Take the hooks off."""
        for there, _ in self._handles.values():
            parameter = there()
            if parameter is not None and _watch_of(parameter) is self:
                del _averaged_by[parameter]
        _take_off(self._handles)

    def _gradient_is_there(self, parameter: Tensor) -> None:
        compiled = sys.modules.get("torch._dynamo.compiled_autograd")
        if compiled is not None and getattr(compiled, "in_compiled_autograd_region", False):
            raise UnsupportedError(
                "compiled autograd (torch._dynamo.config.compiled_autograd) is not supported: in a"
                " compiled backward pass nobody can tell when all gradients are there. Compile the"
                " model by torch.compile, and leave the backward pass to autograd itself."
            )
        on_gradient = self._on_gradient()
        if on_gradient is None:
            return
        on_gradient(parameter)
        this_pass = torch._C._current_graph_task_id()
        if self._at_end is not None and self._queued_in != this_pass:
            self._queued_in = this_pass
            after_engines(self._finish)

    def _finish(self) -> None:
        self._queued_in = None
        if _within_another_pass():
            raise UnsupportedError(
                'reduce_at="backward" with reentrant activation checkpointing: each checkpointed'
                " part has a backward pass of its own, and gradients would be averaged at the end"
                " of each. Use checkpoint(..., use_reentrant=False) (Trainer:"
                ' gradient_checkpointing_kwargs={"use_reentrant": False}), or reduce_at="step".'
            )
        at_end = self._at_end() if self._at_end is not None else None
        if at_end is not None:
            at_end()


def _take_off(handles: dict[int, tuple[weakref.ref[Tensor], Any]]) -> None:
    for _, handle in handles.values():
        handle.remove()
    handles.clear()


def _watch_of(parameter: Tensor) -> BackwardWatch | None:
    """Return the watch at whose end this parameter's gradient is averaged."""
    there = _averaged_by.get(parameter)
    return there() if there is not None else None


def _let_go(parameter: Tensor) -> None:
    """Ask the watch that a parameter belongs to, if there is one, to give way.

    Raises:
        ConfigError: it is in use.
    """
    watch = _watch_of(parameter)
    if watch is not None and not watch.give_way():
        raise ConfigError(
            'reduce_at="backward": another optimizer with reduce_at="backward" holds the same'
            " parameters, and both would average their gradients. Call detach() on the other"
            " one first (Trainer: callback.detach(); Accelerate: accelerator.free_memory())."
        )


def _within_another_pass() -> bool:
    """Return whether this backward pass was started by the backward of a custom
    function, hence inside another pass.
    """
    callers = traceback.walk_stack(sys._getframe())
    return any(frame.f_code is _BACKWARD_OF_A_FUNCTION for frame, _ in callers)


def after_engines(run: Callable[[], None]) -> None:
    """Call `run` at the end of the present backward pass, after the callbacks that
    engines such as DDP queue for themselves.
    """
    queue = torch.autograd.Variable._execution_engine.queue_callback
    queue(lambda: queue(run))


def runs_last(parameter: Tensor) -> bool:
    """Return whether no hook of a user runs after ours, which would change a gradient
    that has been read.
    """
    hooks = parameter._post_accumulate_grad_hooks or {}
    return not hooks or _is_ours(next(reversed(hooks.values())))


@torch.no_grad()
def run_users_hooks(parameter: Tensor) -> None:
    """Run the users' hooks of a parameter that gets its gradient past autograd."""
    for hook in tuple((parameter._post_accumulate_grad_hooks or {}).values()):
        if not _is_ours(hook):
            hook(parameter)


def _is_ours(hook: Any) -> bool:
    return getattr(hook, "__module__", None) == __name__
