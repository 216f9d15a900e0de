"""The workers of a run, and this rank's place among them.

A worker is one participant of the compressed average: a rank, or a node whose ranks
hold its parameters in blocks of rows (`intra_node`). `Workers` knows both groups, and
does what all ranks do together beside averaging: they exchange text, they ask whether
something is so on any rank of the node, and they agree on their settings before the
first collective whose size depends on them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lowrank_comm.communication.agreement import check_same, raise_if_different
from lowrank_comm.communication.group import LENGTH_BYTES, Group
from lowrank_comm.communication.intra_node import IntraNodeGroup
from lowrank_comm.communication.topology import launched_ranks
from lowrank_comm.errors import (
    ConfigError,
    ConfigMismatchError,
    LowRankCommError,
    StateMismatchError,
)
from lowrank_comm.version import __version__


class Workers:
    """All ranks of all nodes.

    Args:
        group: the workers; where a worker is a node, the ranks that hold the same
            blocks in the other nodes.
        intra_node: the ranks of this node; None where this rank is a worker by itself.
        device: of the tensors that carry text and flags.

    Attributes:
        agreed: whether all ranks have compared their settings since they last changed;
            set to False by what changes them.
    """

    def __init__(
        self,
        group: Group,
        intra_node: IntraNodeGroup | None = None,
        device: torch.device = torch.device("cpu"),  # noqa: B008  (immutable)
    ) -> None:
        self.group, self.device = group, device
        self.intra_node = intra_node or IntraNodeGroup()
        self.agreed = False

    @property
    def global_rank(self) -> int:
        """This rank's number among all ranks of all nodes."""
        return self.group.rank * self.intra_node.size + self.intra_node.rank

    @property
    def world_size(self) -> int:
        """Number of ranks of all nodes."""
        return self.group.size * self.intra_node.size

    @property
    def is_writer(self) -> bool:
        """Whether this is the one rank that writes what all share."""
        return self.global_rank == 0

    def any_in_the_node(self, flag: bool) -> bool:
        """Return whether the flag is raised on any rank of this node; a collective of
        these ranks.
        """
        return self.sum_in_the_node(flag) != 0.0

    def sum_in_the_node(self, number: float) -> float:
        """Return the sum of a number over the ranks of this node; a collective of these
        ranks.
        """
        if self.intra_node.size == 1:
            return number
        # filled by a kernel, not by a transfer
        summed = torch.full((1,), float(number), dtype=torch.float32, device=self.device)
        self.intra_node.sum_(summed, "control")
        return self.intra_node.read(summed, [0.0])[0]

    def all_gather_text(self, text: str) -> list[str]:
        """Gather a text from every rank of every node, in the order of `global_rank`
        (the writer's first); a collective.
        """
        by_worker = [part.decode() for part in self.group.gather_bytes(text.encode(), self.device)]
        if self.intra_node.size == 1:
            return by_worker
        by_block = [
            json.loads(part) for part in self._gather_in_the_node(json.dumps(by_worker).encode())
        ]
        return [block[k] for k in range(self.group.size) for block in by_block]

    def all_gather_numbers(self, numbers: Tensor) -> list[list[int]]:
        """Gather a vector of int64 from every rank of every node, in the order of
        `global_rank`; a collective, for whose result the host waits.
        """
        of_all = by_worker = self.group.gather(numbers)
        if self.intra_node.size > 1:
            by_block = self.intra_node.gather(by_worker.view(-1), "fingerprint")
            of_all = by_block.view(self.intra_node.size, *by_worker.shape).transpose(0, 1)
        everyone: list[list[int]] = of_all.reshape(-1, len(numbers)).tolist()
        return everyone

    def copy_from(self, rank: int, tensors: Sequence[Tensor], whole: bool) -> None:
        """Overwrite tensors by those of a rank; a collective.

        Args:
            rank: whose tensors to take, by `global_rank`.
            tensors: of the same shapes and dtypes on all ranks that take part.
            whole: whether the other ranks of the nodes hold the same; else only those
                with the place of `rank` in its node take part.
        """
        worker, place = divmod(rank, self.intra_node.size)
        if self.intra_node.rank == place:
            self.group.copy_from(worker, tensors, self.device)
        if whole and self.intra_node.size > 1:
            Group(self.intra_node.process_group).copy_from(place, tensors, self.device)

    def refuse_together(self, error: Exception | None, what: str = "", found: str = "") -> None:
        """Raise on every rank if some rank cannot use what it was given to load; a
        collective.

        Args:
            error: this rank's reason; None if it can.
            what: is being loaded, in words.
            found: how this rank found it, which must be the same on all ranks.

        Raises:
            StateMismatchError: on every rank, with the first rank's reason; `error`
                itself on a rank by itself.
        """
        words = str(error) if isinstance(error, LowRankCommError) else repr(error)
        mine = json.dumps({"error": "" if error is None else words, "found": found})
        told = [json.loads(text) for text in self.all_gather_text(mine)]
        if error is not None and len(told) == 1:
            raise error
        for rank, one in enumerate(told):
            if one["error"]:
                raise StateMismatchError(f"rank {rank}: {one['error']}") from error
        if len({one["found"] for one in told}) > 1:
            seen = ", ".join(f"{one['found']} on rank {rank}" for rank, one in enumerate(told))
            raise StateMismatchError(f"{what} is {seen}; all workers must see the same files.")

    def agree(
        self, description: Mapping[str, Any], in_the_node: Mapping[str, Any] | None = None
    ) -> int:
        """Compare settings and the library's version with the other workers, and
        between the ranks of this node; a collective.

        A difference that one rank sees is told to the other ranks of its node, which
        would wait for it otherwise.

        Args:
            description: what must be equal on all workers: plain values.
            in_the_node: what must be equal on the ranks of this node, which hold other
                blocks; None for the same as between workers.

        Returns:
            Bytes that this rank sent to the other workers for it.

        Raises:
            ConfigMismatchError: on every rank, if any two differ.
            ConfigError: on every rank, if there is no process group though a launcher
                has started several.
        """
        launched = launched_ranks()
        if launched > 1 and not self.group.initialised:
            raise ConfigError(
                f"WORLD_SIZE={launched} is in the environment, as torchrun sets it, but there is no"
                " process group: each process would train a model of its own. Call"
                ' torch.distributed.init_process_group("nccl") (on CPUs "gloo") before the first'
                " step; or unset WORLD_SIZE if each process is to train by itself."
            )
        error, sent = "", 0
        description = {**description, "version of lowrank_comm": __version__}
        try:
            sent = check_same(description, self.group, self.device)
        except ConfigMismatchError as mismatch:
            error = str(mismatch)
        if self.intra_node.size > 1:
            shared = description if in_the_node is None else in_the_node
            mine = json.dumps({"error": error, "shared": shared}, default=repr).encode()
            told = [json.loads(part) for part in self._gather_in_the_node(mine)]
            self.intra_node.bytes["fingerprint"] += len(mine) + LENGTH_BYTES
            error = next((one["error"] for one in told if one["error"]), "")
            if not error:
                raise_if_different([one["shared"] for one in told])
        if error:
            raise ConfigMismatchError(error)
        self.agreed = True
        return sent

    def _gather_in_the_node(self, payload: bytes) -> list[bytes]:
        return Group(self.intra_node.process_group).gather_bytes(payload, self.device)
