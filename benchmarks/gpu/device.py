"""Where a rank computes, and on which of the library's paths."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from lowrank_comm.numerics.device import accelerator_path


@dataclass(frozen=True)
class Device:
    """Where this rank computes.

    Attributes:
        kind: "cuda", or "cpu" for a trial of the checks themselves.
        device: of this rank.
        name: of the hardware.
    """

    kind: str
    device: torch.device
    name: str

    @classmethod
    def of_a_rank(cls, kind: str, rank: int) -> Device:
        """Return the device of a rank, and make it the current one; ranks beyond the
        number of GPUs share them.
        """
        if kind == "cpu":
            torch.set_num_threads(1)
            return cls(kind, torch.device("cpu"), "CPU")
        device = torch.device("cuda", rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        # the model's own products too: it is compared with a CPU's
        torch.set_float32_matmul_precision("highest")
        return cls(kind, device, torch.cuda.get_device_name(device))

    @property
    def is_gpu(self) -> bool:
        """Whether it is one."""
        return self.kind != "cpu"

    @property
    def rank(self) -> int:
        """Number of this rank."""
        return dist.get_rank()

    @property
    def world(self) -> int:
        """Number of ranks."""
        return dist.get_world_size()

    def wait(self) -> None:
        """Wait until the GPU has done what it was given."""
        if self.is_gpu:
            torch.cuda.synchronize()

    @contextlib.contextmanager
    def path(self) -> Iterator[None]:
        """Take the accelerator's branches of the library inside, on a CPU too."""
        with contextlib.nullcontext() if self.is_gpu else accelerator_path():
            yield
