"""Checks that end in every way that a check on a GPU may end, in the place of
`benchmarks.gpu.parts`.
"""

from __future__ import annotations

import os
import signal
import time

import torch
import torch.distributed as dist

from benchmarks.gpu.device import Device
from benchmarks.gpu.outcome import Check, Found, Skipped, demand


def fine(device: Device) -> Found:
    """Pass, with a collective in which all ranks must be."""
    ranks = torch.ones(1)
    dist.all_reduce(ranks)
    return Found("1", {"ranks": ranks.item()})


def wrong(device: Device) -> Found:
    """Fail on the last rank only."""
    return demand(device.rank < device.world - 1, "difference 1.0", difference=1.0)


def left_out(device: Device) -> Found:
    """Skip."""
    raise Skipped("needs what is not there")


def raising(device: Device) -> Found:
    """Raise on rank 1, while the others wait for it in a collective."""
    if device.rank == 1:
        raise ZeroDivisionError("by zero")
    return fine(device)


def dying(device: Device) -> Found:
    """Be killed on rank 0."""
    if device.rank == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return fine(device)


def endless(device: Device) -> Found:
    """Go on beyond the part's time."""
    time.sleep(600)
    return fine(device)


def checks_of(part: str) -> tuple[Check, ...]:
    """Return all of them, by the names of their functions."""
    if part == "no start":
        raise RuntimeError("these processes do not begin")
    makes = (fine, wrong, left_out, raising, dying, endless)
    return (*(Check(make.__name__, make) for make in makes), Check("last", fine))
