"""Requests inside a node: what its ranks exchange among themselves on the way to a
packet and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_comm.communication.intra_node import joined, split_like
from lowrank_comm.communication.workers import Workers
from lowrank_comm.compressors.requests import (
    ComputeOnce,
    Mean,
    Request,
    SumOverRows,
    WholeRows,
)


@dataclass
class Share:
    """What of a request this rank carries between the workers.

    Attributes:
        tensor: this rank's share.
        whole: this worker's sum over rows, of which `tensor` is the share; None where
            the share is of another kind.
    """

    tensor: Tensor
    whole: Tensor | None = None


class IntraNodeRequests:
    """What happens inside a node on the way to a packet and back; with one rank in the
    node, next to nothing.

    Args:
        workers: who takes part.

    Attributes:
        group: the ranks of the node, if they compute whole matrices together; else
            this rank alone.
    """

    def __init__(self, workers: Workers) -> None:
        node = workers.intra_node
        self.group = node if node.whole_matrices else node.alone()
        self._workers = Workers(workers.group, self.group)

    def answer(self, requests: Mapping[int, Request]) -> dict[int, object]:
        """Answer sums over rows, all of one dtype in one collective, and whole rows."""
        by_dtype: dict[torch.dtype, dict[int, Tensor]] = {}
        answers: dict[int, object] = {}
        for k, request in requests.items():
            if isinstance(request, SumOverRows):
                by_dtype.setdefault(request.tensor.dtype, {})[k] = request.tensor
        for sums in by_dtype.values():
            totals = self.group.sum_in_order(list(sums.values()), "sums")
            answers.update(zip(sums, totals, strict=True))
        for k, request in requests.items():
            if isinstance(request, WholeRows):
                answers[k] = self.group.whole_rows(request.tensor, request.m, "rows")
        return answers

    def shares(self, asking: Mapping[int, Request], before: int = 0) -> dict[int, Share]:
        """Return this rank's share of each request that is shared out: sums over rows
        among the ranks of the node, what is computed once among all ranks, matrix by
        matrix.

        Args:
            asking: the requests of a packet, by generator.
            before: matrices of earlier packets of the pass that were computed once: the
                ranks take turns over all of them.
        """
        over_rows = {
            k: request.tensor
            for k, request in asking.items()
            if self.group.size > 1 and isinstance(request, Mean) and request.over_rows
        }
        shares: dict[int, Share] = {}
        if over_rows:
            parts = list(over_rows.values())
            # this worker's own, so no other node need have the same bits
            total = joined(parts)
            self.group.sum_(total, "sums")
            for k, whole in zip(over_rows, split_like(total, parts), strict=True):
                shares[k] = Share(whole.reshape(-1)[self.group.block(whole.numel())], whole)
        offset = before
        for k, request in asking.items():
            if isinstance(request, ComputeOnce):
                shares[k] = Share(self._compute(request, offset))
                offset += request.matrices.shape[0]
        return shares

    def put_together(self, share: Share, mean: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Return (mean, own) of a whole sum over rows from what came back for a share
        of it.
        """
        whole = share.whole
        assert whole is not None

        def together(part: Tensor) -> Tensor:
            column = part.reshape(1, -1, 1)
            return self.group.whole_rows(column, whole.numel(), "shares").reshape(whole.shape)

        # `own` is another tensor where the wire rounds
        as_sent = whole if own is share.tensor else together(own)
        return together(mean), as_sent

    def _compute(self, request: ComputeOnce, offset: int) -> Tensor:
        """Return (B, own rows, k), zero where another worker computes. Each rank keeps
        the whole matrices of its share only.
        """
        count = request.matrices.shape[0]
        rank, ranks = self._workers.global_rank, self._workers.world_size
        mine = range((rank - offset) % ranks, count, ranks)
        given = request.matrices[mine.start :: ranks]
        if self.group.size > 1:
            kept = []
            for index in range(count):
                block = request.matrices[index : index + 1]
                matrix = self.group.whole_rows(block, request.m, "rows")
                if index in mine:
                    kept.append(matrix)
            given = torch.cat(kept) if len(kept) > 1 else kept[0] if kept else given
        whole = request.matrices.new_zeros(count, request.m, request.columns)
        if mine:
            whole[mine.start :: ranks] = request.of(given, list(mine))
        self.group.sum_(whole, "rows")
        return whole[:, self.group.block(request.m)]
