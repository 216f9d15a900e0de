"""A bidirectional method over torch.distributed: every rank is a worker, rank 0 of the
group is the server too.

    uplink     gather on rank 0: K numbers and one flag from each rank; the server draws
               the same coordinates again
    verdict    when the server has stepped, broadcast of one number: 1; 0 where some
               rank's numbers or the mean are not finite, so that it has not, and the
               step ends; -1 where the server's optimizer has raised, after which all
               ranks gather its message and raise
    downlink   if G divides n, G < n, and the workers are all ranks of the default
               group: in each of G fixed process groups, a broadcast of the group's
               block from rank 0; otherwise a scatter of the ranks' blocks
    coin       broadcast of x+ to all, in the place of the downlink

Rank 0's own message does not leave the process. The groups are made once, by all ranks,
at the first step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_comm.bidirectional.ledger import LinkLedger
from lowrank_comm.bidirectional.permk import Blocks
from lowrank_comm.bidirectional.transport import Context, Transport
from lowrank_comm.communication.failures import collective_failed
from lowrank_comm.communication.group import Group
from lowrank_comm.communication.topology import timeout_of
from lowrank_comm.errors import LowRankCommError


@contextlib.contextmanager
def _asking() -> Iterator[None]:
    """Ask, where the collective in the block fails, whether all ranks made the call."""
    try:
        yield
    except RuntimeError as error:
        raise collective_failed(error) from error


class ProcessGroupTransport(Transport):
    """Carries the messages of one rank.

    Args:
        group: the workers; without a process group, this process is the only one and
            the server.
        ledger: where the traffic of the busiest link is entered.
    """

    def __init__(self, group: Group, ledger: LinkLedger) -> None:
        super().__init__(ledger)
        self.group = group
        self._parts: dict[tuple[int, int], list[Any]] = {}

    @property
    def _server(self) -> int:
        """Global rank of the server."""
        parent = self.group.process_group
        return 0 if parent is None else dist.get_global_rank(parent, 0)

    def down(self, context: Context, change: Tensor | None, blocks: Blocks, like: Tensor) -> Tensor:
        if context.n == 1:
            return super().down(context, change, blocks, like)
        length, (worker,) = blocks.length(), context.workers
        self.ledger.enter("downlink", length, like.itemsize)

        def block(number: int) -> Tensor:
            """Return the block of a group, with zeros behind it up to the length of the
            longest; without the server, room for it.
            """
            padded = like.new_zeros(length)
            if change is not None:
                there = blocks.coordinates(number).to(like.device)
                padded[: len(there)] = change[there]
            return padded

        own = int(blocks.group[worker])
        parts = self._process_groups(context.n, blocks.count)
        if parts is not None:
            for number, part in enumerate(parts):
                if context.serves or number == own:
                    message = block(number)
                    with _asking():
                        dist.broadcast(message, self._server, group=part)
                    if number == own:
                        received = message
        else:
            received = like.new_zeros(length)
            messages = [block(int(number)) for number in blocks.group] if context.serves else None
            with _asking():
                dist.scatter(received, messages, self._server, group=self.group.process_group)
        return blocks.place(received[: len(blocks.coordinates(own))], worker)[None]

    def from_server(self, tensor: Tensor, kind: str) -> Tensor:
        """Return rank 0's tensor on all ranks, outside of steps; `kind` is the
        ledger's.
        """
        self.ledger.bytes[kind] += tensor.numel() * tensor.itemsize
        return self._from_server(tensor.clone())

    def _gather(self, values: Tensor, finite: bool) -> tuple[Tensor, bool] | None:
        self.ledger.bytes["control"] += 2 * values.itemsize
        n, serves = self.group.size, self.group.rank == 0
        if n == 1:
            return values, finite
        message = torch.cat([values[0], values.new_tensor([float(finite)])])
        messages = [torch.empty_like(message) for _ in range(n)] if serves else None
        with _asking():
            dist.gather(message, messages, self._server, group=self.group.process_group)
        if messages is None:
            return None
        rows = torch.stack(messages)
        return rows[:, :-1], bool((rows[:, -1] > 0).all())

    def _verdict(self, verdict: float, like: Tensor) -> float:
        return float(self._from_server(like.new_tensor([verdict])))

    def _tell(self, error: Exception | None, like: Tensor) -> NoReturn:
        mine = b"" if error is None else f"{type(error).__name__}: {error}".encode()
        told, *_ = self.group.gather_bytes(mine, like.device)
        if error is not None:
            raise error
        raise LowRankCommError(
            "lowrank_comm: the base optimizer, which steps on rank 0, has raised there"
            f" ({told.decode()}). The parameters of all ranks are as before the step."
        )

    def _from_server(self, tensor: Tensor) -> Tensor:
        if self.group.size > 1:
            with _asking():
                dist.broadcast(tensor, self._server, group=self.group.process_group)
        return tensor

    def _process_groups(self, n: int, count: int) -> list[Any] | None:
        """Return a process group for each group of workers: its members and rank 0.
        None where the members change, or the workers are not all ranks of the default
        group, which must all take part in making a process group; the first call is a
        collective of them.

        (use_local_synchronization hangs on gloo where groups overlap, as they do in
        rank 0; torch 2.13.)
        """
        if not (count < n and n % count == 0 and dist.get_world_size() == n):
            return None
        if (n, count) not in self._parts:
            parent = self.group.process_group
            ranks = dist.get_process_group_ranks(parent) if parent is not None else list(range(n))
            members = [[0, *(i for i in range(number, n, count) if i)] for number in range(count)]
            timeout = timeout_of(self.group.process_group)
            self._parts[n, count] = [
                dist.new_group([ranks[i] for i in one], timeout) for one in members
            ]
        return self._parts[n, count]
