"""Requests inside a node: what its ranks exchange among themselves on the way to a
packet and back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lowrank_comm.communication.intra_node import IntraNodeGroup
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
        in_blocks = workers.intra_node.whole_matrices
        self.group = workers.intra_node if in_blocks else IntraNodeGroup()
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

    def shares(self, asking: Mapping[int, Request]) -> dict[int, Share]:
        """Return this rank's share of each request that is shared out: sums over rows
        among the ranks of the node, what is computed once among all ranks, matrix by
        matrix.
        """
        over_rows: dict[int, Tensor] = {}
        if self.group.size > 1:
            for k, request in asking.items():
                if isinstance(request, Mean) and request.over_rows:
                    over_rows[k] = request.tensor
        shares: dict[int, Share] = {}
        for k, whole in zip(over_rows, self._summed(list(over_rows.values())), strict=True):
            shares[k] = Share(whole.reshape(-1)[self.group.block(whole.numel())], whole)
        offset = 0
        for k, request in asking.items():
            if isinstance(request, ComputeOnce):
                shares[k] = Share(self._compute(request, offset))
                offset += request.matrices.shape[0]
        return shares

    def put_together(self, share: Share, mean: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Return (mean, own) of a whole sum over rows from what came back for a share
        of it.
        """
        assert share.whole is not None
        # `own` is another tensor where the wire rounds
        as_sent = share.whole if own is share.tensor else self._put_together(own, share.whole)
        return self._put_together(mean, share.whole), as_sent

    def _summed(self, parts: list[Tensor]) -> list[Tensor]:
        """Return the sums over the node of tensors of one dtype; this worker's own, so
        no other node need have the same bits.
        """
        if not parts:
            return []
        flat = torch.cat([part.reshape(-1) for part in parts])
        self.group.sum_([flat], "sums")
        return [
            piece.view(part.shape)
            for piece, part in zip(flat.split([p.numel() for p in parts]), parts, strict=True)
        ]

    def _put_together(self, share: Tensor, like: Tensor) -> Tensor:
        """Return the whole from the shares of all ranks of the node."""
        column = share.reshape(1, -1, 1)
        return self.group.whole_rows(column, like.numel(), "shares").reshape(like.shape)

    def _compute(self, request: ComputeOnce, offset: int) -> Tensor:
        """Return (B, own rows, k), zero where another worker computes. Each rank keeps
        the whole matrices of its share only.
        """
        count, rows, _ = request.matrices.shape
        rank, ranks = self._workers.global_rank, self._workers.world_size
        mine = [index for index in range(count) if (offset + index) % ranks == rank]
        if self.group.size == 1:
            parts = request.matrices.new_zeros(count, rows, request.columns)
            if mine:
                parts[mine] = request.of(request.matrices[mine], mine)
            return parts
        kept = []
        for index in range(count):
            matrix = self.group.whole_rows(request.matrices[index : index + 1], request.m, "rows")
            if index in mine:
                kept.append(matrix)
        whole = request.matrices.new_zeros(count, request.m, request.columns)
        if kept:
            whole[mine] = request.of(torch.cat(kept), mine)
        self.group.sum_([whole], "rows")
        return whole[:, self.group.block(request.m)]
