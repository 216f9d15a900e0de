"""What differs between a CPU and an accelerator, and transfers of plain numbers without
waiting for the device.

On an accelerator each operation is a launch of some microseconds and products of many
matrices run side by side, so that the matrices of one shape share all operations,
however large they are. A CPU works through a matrix of some size alone, block of rows
by block, while the block is in its cache. Whoever chooses between the two asks
`on_accelerator`, and nobody looks at a device's type, so that tests can take the
accelerator's path on a CPU.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

# not a context variable: engines call from threads of autograd
_forced = 0
# of this thread's tensors without numbers, in the place of which device they are on
_rehearsed = threading.local()


@contextlib.contextmanager
def accelerator_path() -> Iterator[None]:
    """Let CPU tensors take every branch that an accelerator's take; every matrix then
    counts as large.

    For tests, and to count what a step would cost an accelerator. Optimizers and
    reducers are to be made and used inside: what shares a batch is decided when they
    are made.

    Example:
        >>> import torch
        >>> from lowrank_comm.numerics.device import accelerator_path, on_accelerator
        >>> with accelerator_path():
        ...     on_accelerator(torch.device("cpu"))
        True
    """
    global _forced
    _forced += 1
    try:
        yield
    finally:
        _forced -= 1


@contextlib.contextmanager
def as_if_on_accelerator(answer: bool) -> Iterator[None]:
    """Let tensors on any device take the accelerator's path, or none of them: for a
    rehearsal, whose tensors are on no real device.
    """
    _rehearsed.answer = answer
    try:
        yield
    finally:
        del _rehearsed.answer


def on_accelerator(device: torch.device) -> bool:
    """Return whether work on this device takes the accelerator's path."""
    answer: bool = getattr(_rehearsed, "answer", _forced > 0 or device.type != "cpu")
    return answer


def counts_as_large(numel: int, threshold: int) -> bool:
    """Return whether a tensor on any device is large: above the threshold, and always
    inside `accelerator_path`.
    """
    return _forced > 0 or numel > threshold


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the CPU on `device`, without waiting for the device.

    `tensor.to("cuda")` copies from pageable memory, for which the host waits until all
    earlier work of the GPU is done: a whole backward pass, in every step. From pinned
    memory the copy takes its place in the stream; torch keeps that memory until it is
    done.
    """
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def numbers_on(device: torch.device, numbers: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Return the numbers as a tensor on `device`, without waiting for it; see
    `on_device`.
    """
    return on_device(torch.tensor(numbers, dtype=dtype, device="cpu"), device)


def current_stream(device: torch.device) -> Any:
    """Return the device's current stream; None where there are no streams."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


class Transfers:
    """Copies between a tensor on the host, in pinned memory, and a device: in the order
    in which they are asked for, and without the host's waiting for them.

    Args:
        device: from and to which is copied; None where the tensor is not on the host,
            and nobody has to wait.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._device = device
        # of the last copy; None where there is none to wait for
        self._last: Any = None

    def copy(self, to: Tensor, given: Tensor) -> None:
        """Copy `given` into `to`, one of which is on the host."""
        stream = None if self._device is None else current_stream(self._device)
        if stream is not None and self._last is not None:
            stream.wait_event(self._last)
        to.copy_(given, non_blocking=True)
        if stream is not None:
            self._last = stream.record_event()

    def wait(self) -> None:
        """Let the host wait for the last copy, before it reads or writes the tensor."""
        if self._last is not None:
            self._last.synchronize()
            self._last = None
