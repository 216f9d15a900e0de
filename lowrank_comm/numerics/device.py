"""Transfers of plain numbers to a device without waiting for it, and its current
stream.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def numbers_on(device: torch.device, numbers: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Return the numbers as a tensor on `device`, without waiting for it.

    `torch.tensor(numbers, device="cuda")` copies from pageable memory, for which the
    host waits until all earlier work of the GPU is done: a whole backward pass, in
    every step. From pinned memory the copy takes its place in the stream; torch keeps
    that memory until it is done.
    """
    if device.type != "cuda":
        return torch.tensor(numbers, dtype=dtype, device=device)
    return torch.tensor(numbers, dtype=dtype, pin_memory=True).to(device, non_blocking=True)


def current_stream(device: torch.device) -> Any:
    """Return the device's current stream; None where there are no streams."""
    return torch.cuda.current_stream(device) if device.type == "cuda" else None
