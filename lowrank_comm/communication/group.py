"""The workers that average their gradients: a process group, or this process alone.

The only file that calls `torch.distributed`. Collectives of a phase are started
together and then awaited, so several buffers (one for each wire dtype) are on the wire
side by side. On CUDA `wait()` makes the current stream wait and not the host; buffers
are used on that one stream only, so no `record_stream` is needed. This has never run on
a GPU so far; see docs/gpu.md.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_comm.communication.collectives import AllGather, AllToAll, Exchange, alone
from lowrank_comm.communication.failures import collective_failed
from lowrank_comm.errors import ConfigError

LENGTH_BYTES = torch.int64.itemsize


class Group:
    """A process group as the reducer sees it: a size, a rank, a sum.

    Args:
        process_group: None for the default group (this process alone where
            torch.distributed is not initialised), a `ProcessGroup`, or a 1-D
            `DeviceMesh`.

    Raises:
        ConfigError: a mesh of more than one dimension, something else, or a group that
            this rank does not belong to.
    """

    def __init__(self, process_group: Any = None) -> None:
        # a DeviceMesh
        if hasattr(process_group, "get_group"):
            if process_group.ndim != 1:
                raise ConfigError(
                    f"process_group: a {process_group.ndim}-D mesh {process_group.mesh_dim_names},"
                    " where one dimension is needed; give that between the nodes, for example"
                    " mesh['replicate']."
                )
            process_group = process_group.get_group()
        if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
            outside = process_group is dist.GroupMember.NON_GROUP_MEMBER
            raise ConfigError(
                "process_group: this rank is not a member of the group that it was given; give"
                " every rank a group that it belongs to, or make the optimizer on the members only."
                if outside
                else (
                    "process_group must be None, a ProcessGroup or a 1-D DeviceMesh, got"
                    f" {process_group!r}."
                )
            )
        self.process_group = process_group

    @property
    def initialised(self) -> bool:
        """Whether there is a process group. Asked each time, since it may be made after
        the optimizer.
        """
        return dist.is_available() and dist.is_initialized()

    @property
    def size(self) -> int:
        """Number of workers."""
        return dist.get_world_size(self.process_group) if self.initialised else 1

    @property
    def rank(self) -> int:
        """This worker's number within the group."""
        return dist.get_rank(self.process_group) if self.initialised else 0

    def sum_(self, buffers: Sequence[Tensor]) -> int:
        """All-reduce every buffer in place, by sum; return how many collectives that
        took.
        """
        works = self.start(buffers)
        _wait(works)
        return len(works)

    def start(self, exchanges: Sequence[Exchange]) -> list[Any]:
        """Start every exchange that moves something; return what has `wait()`."""
        works: list[Any] = []
        if not self.initialised:
            for exchange in exchanges:
                alone(exchange)
            return works
        group = self.process_group
        try:
            for one in exchanges:
                if isinstance(one, AllGather):
                    if one.own.numel():
                        parts = list(one.everyone.unbind(0))
                        works.append(dist.all_gather(parts, one.own, group=group, async_op=True))
                elif isinstance(one, AllToAll):
                    if one.given.numel():
                        received, given = one.received, one.given
                        works.append(
                            dist.all_to_all_single(received, given, group=group, async_op=True)
                        )
                elif one.numel():
                    works.append(dist.all_reduce(one, group=group, async_op=True))
        except RuntimeError as error:
            raise collective_failed(error) from error
        return works

    def gather_bytes(self, payload: bytes, device: torch.device) -> list[bytes]:
        """Return every worker's payload, in rank order. Lengths may differ, so they are
        gathered first, in LENGTH_BYTES each.
        """
        if not self.initialised:
            return [payload]
        lengths = self._gather([len(payload)], torch.int64, device)
        widest = max(length for (length,) in lengths)
        parts = self._gather([*payload, *bytes(widest - len(payload))], torch.uint8, device)
        return [bytes(part[:length]) for part, (length,) in zip(parts, lengths, strict=True)]

    def _gather(
        self, numbers: list[int], dtype: torch.dtype, device: torch.device
    ) -> list[list[int]]:
        """Return every worker's numbers, as many from each."""
        gathered = self.gather(torch.tensor(numbers, dtype=dtype, device=device))
        everyone: list[list[int]] = gathered.tolist()
        return everyone

    def gather(self, own: Tensor) -> Tensor:
        """Return the vector of every worker, of one length on all: (N, numel)."""
        gather = AllGather(own, own.new_empty(self.size, own.numel()))
        _wait(self.start([gather]))
        return gather.everyone

    def copy_from(self, worker: int, tensors: Sequence[Tensor], device: torch.device) -> None:
        """Overwrite tensors by those of a worker; a collective.

        Args:
            worker: its number within the group.
            tensors: of the same shapes and dtypes on all workers, anywhere.
            device: which the group can send from.
        """
        if not self.initialised:
            return
        source = worker
        if self.process_group is not None:
            source = dist.get_global_rank(self.process_group, worker)
        for tensor in tensors:
            if not tensor.numel():
                continue
            # as bytes, since not every backend knows every dtype
            sent = tensor.detach().to(device).reshape(-1).view(torch.uint8)
            try:
                dist.broadcast(sent, source, group=self.process_group)
            except RuntimeError as error:
                raise collective_failed(error) from error
            tensor.copy_(sent.view(tensor.dtype).view(tensor.shape))


class PretendedGroup(Group):
    """Worker `rank` of `size`, without a process group: nothing comes of the others."""

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self._size, self._rank = size, rank

    @property
    def initialised(self) -> bool:
        return False

    @property
    def size(self) -> int:
        return self._size

    @property
    def rank(self) -> int:
        return self._rank

    def start(self, exchanges: Sequence[Exchange]) -> list[Any]:
        return []


def _wait(works: Sequence[Any]) -> None:
    try:
        for work in works:
            work.wait()
    except RuntimeError as error:
        raise collective_failed(error) from error


def collectives_so_far() -> int:
    """Return how many collectives this process has started over all its groups, those
    of the engine included.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return 0
    world = getattr(dist.distributed_c10d, "_world", None)
    groups = list(getattr(world, "pg_map", ())) or [dist.group.WORLD]
    total = 0
    for group in groups:
        # a backend that does not count
        with contextlib.suppress(RuntimeError):
            total += int(group._get_sequence_number_for_group())
    return total


def leave() -> None:
    """Leave the default process group, if there is one, at the end of a program.

    On gloo a process that ends within milliseconds of its last collective may be
    aborted after its last line ("terminate called without an active exception", pytorch
    pull request 179291), and the launcher then reports a failure of a run that was
    complete. A moment's wait was enough wherever that was seen.
    """
    if dist.is_available() and dist.is_initialized():
        uses_gloo = "gloo" in dist.get_backend()
        dist.destroy_process_group()
        if uses_gloo:
            time.sleep(0.5)
