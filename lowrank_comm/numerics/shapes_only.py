"""Runs code on tensors that have shapes and no numbers, and meters how much memory they
would take.

Inside `ShapesOnly` every tensor is made on torch's "meta" device, whichever is asked
for, so that an operation costs microseconds and no memory. What the host would read of
one is yes, or 1; a random draw is none. Memory is counted by storages: one is held from
the operation that makes it until the last tensor that shares it is gone. Not seen is
what a kernel takes for itself while it runs, but for decompositions, and norms in
another dtype, which copy what they are given.

    with ShapesOnly() as meter:
        a = torch.zeros(1000, 1000)
        (a @ a).sum()
    meter.peak                      # 8 000 004
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

META = torch.device("meta")
# methods whose result the host holds -> what it is here
_READ = {
    Tensor.item: 1.0,
    Tensor.__bool__: True,
    Tensor.__float__: 1.0,
    Tensor.__int__: 1,
}
_CONVERTS = {Tensor.to, Tensor.new_empty, Tensor.new_zeros, Tensor.new_full, Tensor.new_tensor}
# decompositions work in a copy of what they are given, beside their results
_IN_A_COPY = {torch.ops.aten._linalg_svd.default, torch.ops.aten.linalg_qr.default}
# a norm in a wider dtype is formed of a copy in that
_WIDENED = torch.ops.aten.linalg_vector_norm.default


# the block that is going on in this thread, whose modes are the thread's, too
_here = threading.local()


class ShapesOnly:
    """A block without numbers, and the meter of its memory.

    Attributes:
        held: bytes of all tensors that are there.
        peak: the most that were there at once since `start`, or since the beginning.
    """

    def __init__(self) -> None:
        self.held = self.peak = 0
        # function and arguments -> bytes that it took, and its result's shape and dtype
        self.known: dict[Any, tuple[int, torch.Size, torch.dtype]] = {}
        # of a storage's object -> its address, as if memory were never used again
        self._places: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._addresses = itertools.count(1 << 12, 1 << 48)
        self._modes = contextlib.ExitStack()

    def __enter__(self) -> ShapesOnly:
        self._modes = contextlib.ExitStack()
        self._modes.enter_context(META)
        self._modes.enter_context(_Arguments(self))
        self._modes.enter_context(_Results(self))
        _here.meter = self
        return self

    def __exit__(self, *_: object) -> None:
        del _here.meter
        self._modes.close()

    def start(self) -> int:
        """Begin to look for the peak; return what is held now."""
        self.peak = self.held
        return self.held

    def enter(self, tensor: Tensor) -> None:
        """Count a tensor's storage, unless it is known."""
        storage = tensor.untyped_storage()
        if storage in self._places:
            return
        size = storage.nbytes()
        self._places[storage] = next(self._addresses)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._leave, size).atexit = False

    def take(self, size: int) -> None:
        """Count what a kernel takes for itself while it runs."""
        self.peak = max(self.peak, self.held + size)

    def address(self, tensor: Tensor) -> int:
        """Return where a tensor begins, for who asks whether two of them overlap."""
        place = self._places.get(tensor.untyped_storage(), 0)
        return place + int(tensor.storage_offset()) * tensor.element_size()

    def _leave(self, size: int) -> None:
        self.held -= size


def once_for_a_shape(function: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, int], Tensor]:
    """Carry out a function of a tensor and a number that takes many operations once for
    each shape, where there are shapes only: what it needs is known then.
    """

    @functools.wraps(function)
    def call(tensor: Tensor, number: int) -> Tensor:
        meter: ShapesOnly | None = getattr(_here, "meter", None)
        if meter is None:
            return function(tensor, number)
        key = (function, tensor.shape, tensor.stride(), tensor.dtype, number)
        if key not in meter.known:
            peak, before = meter.peak, meter.start()
            result = function(tensor, number)
            meter.known[key] = (meter.peak - before, result.shape, result.dtype)
            meter.peak = max(peak, meter.peak)
            return result
        needs, shape, dtype = meter.known[key]
        meter.take(needs)
        return tensor.new_empty(shape, dtype=dtype)

    return call


class _Results(TorchDispatchMode):
    """Counts what operations make."""

    def __init__(self, meter: ShapesOnly) -> None:
        super().__init__()
        self._meter = meter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self._meter.enter(result)
        elif result is not None:
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self._meter.enter(leaf)
        if func in _IN_A_COPY:
            self._meter.take(args[0].nbytes)
        elif func is _WIDENED and result.dtype != args[0].dtype:
            self._meter.take(args[0].numel() * result.itemsize)
        return result


class _Arguments(TorchFunctionMode):
    """Makes all tensors without numbers, and answers who wants to read some."""

    def __init__(self, meter: ShapesOnly) -> None:
        super().__init__()
        self._meter = meter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _READ:
            return _READ[func]
        if func is Tensor.tolist:
            return [1.0] * args[0].numel()
        if func is Tensor.data_ptr:
            return self._meter.address(args[0])
        if func is Tensor.cpu:
            return args[0]
        if func in _CONVERTS:
            args = [META if _is_device(value) else value for value in args]
        if "device" in kwargs:
            kwargs["device"] = META
        # those of the host cannot draw for this device
        kwargs.pop("generator", None)
        return func(*args, **kwargs)


def _is_device(value: Any) -> bool:
    return isinstance(value, torch.device | str)
