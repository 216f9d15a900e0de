"""A bidirectional method over torch.distributed: every rank is a worker, rank 0 of the
group is the server too.

    uplink     gather on rank 0: K numbers and one flag from each rank; the server draws
               the same coordinates again
    verdict    broadcast of one number: 1, or 0 where some rank's numbers or the mean
               are not finite, and the step ends
    downlink   if G divides n, G < n, and the workers are all ranks of the default
               group: in each of G fixed process groups, a broadcast of the group's
               block from rank 0; otherwise a scatter of the ranks' blocks
    coin       broadcast of x+ to all, in the place of the downlink

Rank 0's own message does not leave the process. The groups are made once, by all ranks,
at the first step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lowrank_comm.bidirectional.base import Context, Down, Sent, Transport, Up
from lowrank_comm.bidirectional.ledger import LinkLedger
from lowrank_comm.communication.group import Group


class ProcessGroupTransport(Transport):
    """Carries the messages of one rank.

    Args:
        group: the workers; without a process group, this process is the only one and
            the server.
        ledger: where the traffic of the busiest link is entered.
    """

    def __init__(self, group: Group, ledger: LinkLedger) -> None:
        self.group, self.ledger = group, ledger
        self._parts: dict[tuple[int, int], list[Any]] = {}

    @property
    def _server(self) -> int:
        """Global rank of the server."""
        parent = self.group.process_group
        return 0 if parent is None else dist.get_global_rank(parent, 0)

    def up(self, request: Up, context: Context, finite: bool) -> Sent | None:
        d, compressor, n = context.d, request.compressor, context.n
        indices = compressor.indices(context.seed, context.t, n, context.workers, d)
        values = compressor.compress(request.vectors, indices)
        own = compressor.decompress(values, indices, d)
        self.ledger.enter(
            "uplink_dense" if indices is None else "uplink", values.shape[1], values.itemsize
        )
        messages = self._gather(torch.cat([values[0], values.new_tensor([float(finite)])]))
        mean, verdict = None, values.new_zeros(1)
        if messages is not None:
            everyones = compressor.indices(context.seed, context.t, n, range(n), d)
            mean = compressor.mean(messages[:, :-1], everyones, d)
            sound = (messages[:, -1] > 0).all() & torch.isfinite(mean).all()
            verdict = sound.to(values.dtype)[None]
        self.ledger.bytes["control"] += 2 * values.itemsize
        if not bool(self._from_server(verdict) > 0):
            return None
        return Sent(own, mean)

    def down(self, request: Down, context: Context, like: Tensor) -> Tensor:
        blocks, worker, change = request.blocks, context.workers[0], request.change
        self.ledger.enter("downlink", blocks.length(), like.itemsize)
        group = int(blocks.group[worker])
        own = blocks.coordinates(group).to(like.device)
        received = like.new_zeros(blocks.length())
        if context.n == 1:
            assert change is not None
            received[: len(own)] = change[own]
        elif self._has_process_groups(context.n, blocks.count):
            for number, part in enumerate(self._process_groups(context.n, blocks.count)):
                if not (context.serves or group == number):
                    continue
                there = blocks.coordinates(number).to(like.device)
                buffer = like.new_zeros(len(there)) if change is None else change[there]
                if len(there):
                    dist.broadcast(buffer, self._server, group=part)
                if group == number:
                    received[: len(there)] = buffer
        else:
            messages = None
            if change is not None:
                messages = [like.new_zeros(blocks.length()) for _ in range(context.n)]
                for i, message in enumerate(messages):
                    there = blocks.coordinates(int(blocks.group[i])).to(like.device)
                    message[: len(there)] = change[there]
            dist.scatter(received, messages, src=self._server, group=self.group.process_group)
        return blocks.place(received[: len(own)], worker)[None]

    def broadcast(self, vector: Tensor | None, like: Tensor) -> Tensor:
        self.ledger.enter("downlink_dense", like.numel(), like.itemsize)
        return self._from_server(torch.empty_like(like) if vector is None else vector.clone())

    def from_server(self, tensor: Tensor, kind: str) -> Tensor:
        """Return rank 0's tensor on all ranks, outside of steps; `kind` is the
        ledger's.
        """
        self.ledger.bytes[kind] += tensor.numel() * tensor.itemsize
        return self._from_server(tensor.clone())

    def _from_server(self, tensor: Tensor) -> Tensor:
        if self.group.size > 1:
            dist.broadcast(tensor, self._server, group=self.group.process_group)
        return tensor

    def _gather(self, message: Tensor) -> Tensor | None:
        """Return all ranks' messages in rank order on the server, None elsewhere."""
        if self.group.size == 1:
            return message[None]
        serves = self.group.rank == 0
        messages = [torch.empty_like(message) for _ in range(self.group.size)] if serves else None
        dist.gather(message, messages, dst=self._server, group=self.group.process_group)
        return torch.stack(messages) if messages is not None else None

    def _has_process_groups(self, n: int, count: int) -> bool:
        """Return whether the groups have fixed members and can be process groups, in
        whose making all ranks of the default group must take part.

        (use_local_synchronization hangs on gloo where groups overlap, as they do in
        rank 0; torch 2.13.)
        """
        return count < n and n % count == 0 and dist.get_world_size() == n

    def _process_groups(self, n: int, count: int) -> list[Any]:
        """Return a process group for each group of workers: its members and rank 0.
        The first call is a collective of all ranks.
        """
        if (n, count) not in self._parts:
            parent = self.group.process_group
            ranks = dist.get_process_group_ranks(parent) if parent is not None else list(range(n))
            members = [[0, *(i for i in range(number, n, count) if i)] for number in range(count)]
            self._parts[n, count] = [dist.new_group([ranks[i] for i in m]) for m in members]
        return self._parts[n, count]
